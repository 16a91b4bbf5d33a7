// SPDX-License-Identifier: Apache-2.0
#include <xattn/safetensors.h>

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <bit>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string_view>
#include <utility>

#include "check_file.h"

namespace xattn {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

constexpr std::string_view kReader = "safetensors";
constexpr std::string_view kMetadata = "__metadata__";
constexpr uint64_t kMaxHeader = 100'000'000;  // the limit of the official implementation
constexpr size_t kMaxAxes = 64;               // the limit of most of torch's operators
constexpr char kNotJson[] = "header is not JSON in UTF-8, at its byte {}";

struct TypeName {
  at::ScalarType type;
  std::string_view name;
};

// In the order in which tensors lie in a file: decreasing alignment, then as in the official implementation.
constexpr std::array kTypes{
    TypeName{at::kUInt64, "U64"},
    TypeName{at::kLong, "I64"},
    TypeName{at::kDouble, "F64"},
    TypeName{at::kComplexFloat, "C64"},
    TypeName{at::kFloat, "F32"},
    TypeName{at::kUInt32, "U32"},
    TypeName{at::kInt, "I32"},
    TypeName{at::kBFloat16, "BF16"},
    TypeName{at::kHalf, "F16"},
    TypeName{at::kUInt16, "U16"},
    TypeName{at::kShort, "I16"},
    TypeName{at::kFloat8_e5m2fnuz, "F8_E5M2FNUZ"},
    TypeName{at::kFloat8_e4m3fnuz, "F8_E4M3FNUZ"},
    TypeName{at::kFloat8_e8m0fnu, "F8_E8M0"},
    TypeName{at::kFloat8_e4m3fn, "F8_E4M3"},
    TypeName{at::kFloat8_e5m2, "F8_E5M2"},
    TypeName{at::kChar, "I8"},
    TypeName{at::kByte, "U8"},
    TypeName{at::kBool, "BOOL"},
};

const TypeName* find_type(at::ScalarType type) {
  const auto* found = std::ranges::find(kTypes, type, &TypeName::type);
  return found == kTypes.end() ? nullptr : found;
}

const TypeName* find_type(std::string_view name) {
  const auto* found = std::ranges::find(kTypes, name, &TypeName::name);
  return found == kTypes.end() ? nullptr : found;
}

std::string in_quotes(const std::string& text) {
  using Json = nlohmann::json;
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

// What the header says of one tensor.
struct Record {
  std::optional<at::ScalarType> type;
  std::optional<std::vector<uint64_t>> shape;
  std::optional<std::vector<uint64_t>> offsets;
};

// Takes the header token by token, without a tree of it in memory, and refuses each token that the format does not have at this
// place. So nothing nests deeper than the format, and a name given twice is seen.
class HeaderParser : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderParser(const std::string& path) : path_(path) {}

  std::map<std::string, Record> records;
  std::map<std::string, std::string> metadata;

  bool start_object(size_t) override {
    if (level_ == 2) refuse();
    ++level_;
    return true;
  }

  bool key(std::string& key) override {
    if (level_ == 1) {
      const bool is_new = key == kMetadata ? !std::exchange(has_metadata_, true) : records.try_emplace(key).second;
      check(is_new, "has the name {} twice", in_quotes(key));
      name_ = key;
      return true;
    }
    field_ = key;
    if (name_ == kMetadata) {
      check(metadata.try_emplace(key).second, "has the metadata {} twice", in_quotes(key));
    } else {
      check(key == "dtype" || key == "shape" || key == "data_offsets",
            "tensor {} must have dtype, shape and data_offsets only, but has {}", in_quotes(name_), in_quotes(key));
    }
    return true;
  }

  bool string(std::string& value) override {
    if (level_ != 2 || in_list_ || (name_ != kMetadata && field_ != "dtype")) refuse();
    if (name_ == kMetadata) {
      metadata[field_] = value;
      return true;
    }
    const auto* type = find_type(value);
    check(type, "tensor {} has the dtype {}, which torch does not have", in_quotes(name_), in_quotes(value));
    set(records[name_].type, type->type);
    return true;
  }

  bool start_array(size_t) override {
    if (level_ != 2 || in_list_ || name_ == kMetadata || field_ == "dtype") refuse();
    in_list_ = true;
    return true;
  }

  bool number_unsigned(uint64_t value) override {
    if (!in_list_ || list_.size() == kMaxAxes) refuse();
    list_.push_back(value);
    return true;
  }

  bool end_array() override {
    if (field_ == "data_offsets" && list_.size() != 2) refuse();
    set(field_ == "shape" ? records[name_].shape : records[name_].offsets, list_);
    list_.clear();
    in_list_ = false;
    return true;
  }

  bool end_object() override {
    if (level_-- == 2 && name_ != kMetadata) {
      const auto& [type, shape, offsets] = records[name_];
      check(type && shape && offsets, "tensor {} must have dtype, shape and data_offsets, but lacks {}", in_quotes(name_),
            !type ? "dtype" : (!shape ? "shape" : "data_offsets"));
    }
    return true;
  }

  bool null() override { refuse(); }
  bool boolean(bool) override { refuse(); }
  bool number_integer(int64_t) override { refuse(); }
  bool number_float(double, const std::string&) override { refuse(); }
  bool binary(nlohmann::json::binary_t&) override { refuse(); }
  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) override {
    detail::fail_file(kReader, path_, kNotJson, position);
  }

 private:
  template <typename... Args>
  void check(bool ok, fmt::format_string<Args...> format, Args&&... args) const {
    detail::check_file(ok, kReader, path_, format, std::forward<Args>(args)...);
  }

  // For a token that may not stand here: says what should.
  [[noreturn]] void refuse() const {
    check(level_ == 2, "the value of {} must be an object", in_quotes(name_));
    check(name_ != kMetadata, "metadata {} must be a string", in_quotes(field_));
    const auto wanted = field_ == "dtype"   ? "a string"
                        : field_ == "shape" ? "a list of at most 64 non-negative integers"
                                            : "a list of two non-negative integers";
    detail::fail_file(kReader, path_, "{} of tensor {} must be {}", field_, in_quotes(name_), wanted);
  }

  template <typename T>
  void set(std::optional<T>& field, T value) const {
    check(!field, "tensor {} has {} twice", in_quotes(name_), field_);
    field = std::move(value);
  }

  const std::string& path_;
  bool has_metadata_ = false;
  int level_ = 0;               // of objects: 1 names, 2 fields
  std::string name_;            // at level 1
  std::string field_;           // at level 2
  bool in_list_ = false;        // inside a field
  std::vector<uint64_t> list_;  // read so far
};

// Bytes that a tensor takes, or nothing if torch cannot count its elements. Strides, too, must fit, so zeros count as ones first.
std::optional<uint64_t> byte_count(const std::vector<uint64_t>& shape, at::ScalarType type) {
  uint64_t bytes = c10::elementSize(type);
  bool empty = false;
  for (uint64_t size : shape) {
    if (size > std::numeric_limits<int64_t>::max() / bytes) return {};
    bytes *= std::max<uint64_t>(size, 1);
    empty |= size == 0;
  }
  return empty ? 0 : bytes;
}

// The tensors of a file whose data begins at `data_begin`. As the format demands, they fill the data exactly.
std::map<std::string, SafetensorsFile::Entry> laid_out(const std::string& path,
                                                       const std::map<std::string, Record>& records,
                                                       uint64_t data_begin,
                                                       uint64_t data_size) {
  const auto check = [&path]<typename... Args>(bool ok, fmt::format_string<Args...> format, Args&&... args) {
    detail::check_file(ok, kReader, path, format, std::forward<Args>(args)...);
  };

  std::map<std::string, SafetensorsFile::Entry> entries;
  std::vector<std::pair<const std::string, SafetensorsFile::Entry>*> in_order;
  for (const auto& [name, record] : records) {
    const uint64_t begin = record.offsets->at(0);
    const uint64_t end = record.offsets->at(1);
    const auto shape = fmt::format("[{}]", fmt::join(*record.shape, ", "));
    check(begin <= end, "tensor {} ends at {} before it begins at {}", in_quotes(name), end, begin);
    check(end <= data_size, "tensor {} ends at {}, beyond the file's {} bytes of data; a download may have been cut off",
          in_quotes(name), end, data_size);
    const auto bytes = byte_count(*record.shape, *record.type);
    check(bytes.has_value(), "shape {} of tensor {} is more than can be counted", shape, in_quotes(name));
    check(bytes == end - begin, "tensor {} of type {} and shape {} takes {} bytes, but its data_offsets [{}, {}] hold {}",
          in_quotes(name), find_type(*record.type)->name, shape, *bytes, begin, end, end - begin);
    SafetensorsFile::Entry entry{*record.type, {record.shape->begin(), record.shape->end()}, data_begin + begin, *bytes};
    in_order.push_back(&*entries.emplace(name, std::move(entry)).first);
  }

  std::ranges::sort(in_order, {}, [](const auto* item) { return std::pair(item->second.offset, item->second.bytes); });
  uint64_t filled = 0;
  for (const auto* item : in_order) {
    const auto& [name, entry] = *item;
    const uint64_t begin = entry.offset - data_begin;
    check(begin >= filled, "tensor {} begins at {}, inside another that ends at {}", in_quotes(name), begin, filled);
    check(begin == filled, "tensor {} begins at {}, but the one before it ends at {}", in_quotes(name), begin, filled);
    filled += entry.bytes;
  }
  check(filled == data_size, "has {} bytes of data, but its tensors end at {}", data_size, filled);
  return entries;
}

}  // namespace

SafetensorsFile::SafetensorsFile(std::string path) : path_(std::move(path)) {
  const auto check = [this]<typename... Args>(bool ok, fmt::format_string<Args...> format, Args&&... args) {
    detail::check_file(ok, kReader, path_, format, std::forward<Args>(args)...);
  };

  std::error_code error;
  const uint64_t file_size = std::filesystem::file_size(path_, error);
  check(!error, "cannot be opened: {}", error.message());
  std::ifstream in(path_, std::ios::binary);
  check(in.is_open(), "cannot be opened: {}", detail::system_reason());

  uint64_t header_size = 0;
  check(file_size >= sizeof(header_size), "must begin with a header length of 8 bytes, but has {} bytes", file_size);
  in.read(reinterpret_cast<char*>(&header_size), sizeof(header_size));
  const uint64_t after_length = file_size - sizeof(header_size);
  check(header_size <= after_length, "header length {} exceeds the file's {} bytes; a download may have been cut off",
        header_size, file_size);
  check(header_size <= kMaxHeader, "header length {} exceeds the format's limit of {}", header_size, kMaxHeader);

  std::string header(header_size, '\0');
  in.read(header.data(), static_cast<std::streamsize>(header_size));
  check(in.good(), "cannot be read");
  check(header.starts_with('{'), "header must begin with '{{'");
  // The parser would take a zero byte for the end and ignore what follows.
  const size_t zero = header.find('\0');
  check(zero == std::string::npos, kNotJson, zero + 1);

  HeaderParser parser(path_);
  nlohmann::json::sax_parse(header, &parser);
  metadata_ = std::move(parser.metadata);
  entries_ = laid_out(path_, parser.records, sizeof(header_size) + header_size, after_length - header_size);
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const auto found = entries_.find(name);
  detail::check_file(found != entries_.end(), kReader, path_, "has no tensor {}", in_quotes(name));
  const auto& entry = found->second;

  c10::InferenceMode off(false);  // a tensor made in inference mode could never be trained
  at::Tensor tensor = at::empty(entry.shape, entry.type);
  auto* data = static_cast<char*>(tensor.data_ptr());
  std::ifstream in(path_, std::ios::binary);
  in.seekg(static_cast<std::streamoff>(entry.offset));
  in.read(data, static_cast<std::streamsize>(entry.bytes));
  detail::check_file(in.good(), kReader, path_, "tensor {} cannot be read; the file has changed since it was opened",
                     in_quotes(name));
  if (entry.type == at::kBool) {
    // Any other byte in a bool is undefined behaviour.
    const bool valid = std::all_of(data, data + entry.bytes, [](char byte) { return byte == 0 || byte == 1; });
    detail::check_file(valid, kReader, path_, "tensor {} of type BOOL holds a byte other than 0 and 1", in_quotes(name));
  }
  return tensor;
}

void save_safetensors(const std::string& path,
                      const std::map<std::string, at::Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  const auto check = [&path]<typename... Args>(bool ok, fmt::format_string<Args...> format, Args&&... args) {
    detail::check_file(ok, kReader, path, format, std::forward<Args>(args)...);
  };

  struct Item {
    const TypeName* type;
    std::string name;
    at::Tensor tensor;
  };
  std::vector<Item> items;
  for (const auto& [name, tensor] : tensors) {
    check(name != kMetadata, "a tensor must not have the format's own name {}", in_quotes(name));
    check(tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_meta(), "tensor {} must be dense and have data",
          in_quotes(name));
    const auto* type = find_type(tensor.scalar_type());
    check(type, "tensor {} is {}, which the format does not have", in_quotes(name),
          c10::getDtypeNames(tensor.scalar_type()).first);
    items.push_back({type, name, tensor.detach()});
  }
  std::ranges::stable_sort(items, {}, &Item::type);

  std::string header;
  const auto add = [&header](const std::string& name, const std::string& value) {
    header += fmt::format("{}{}:{}", header.empty() ? "{" : ",", nlohmann::json(name).dump(), value);
  };
  try {
    if (!metadata.empty()) add(std::string(kMetadata), nlohmann::json(metadata).dump());
    uint64_t offset = 0;
    for (const auto& [type, name, tensor] : items) {
      const uint64_t end = offset + tensor.nbytes();
      add(name, fmt::format(R"({{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", type->name,
                            fmt::join(tensor.sizes(), ","), offset, end));
      offset = end;
    }
  } catch (const nlohmann::json::type_error&) {
    detail::fail_file(kReader, path, "names and metadata must be UTF-8");
  }
  header += header.empty() ? "{}" : "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');  // aligns the data
  const uint64_t header_size = header.size();
  check(header_size <= kMaxHeader, "header length {} exceeds the format's limit of {}", header_size, kMaxHeader);

  std::error_code error;
  const auto there = std::filesystem::status(path, error);
  check(!exists(there) || is_regular_file(there), "is there, but is not a regular file");
  const std::string beside = fmt::format("{}.{:08x}.tmp", path, std::random_device{}());
  try {
    std::ofstream out(beside, std::ios::binary);
    check(out.is_open(), "cannot be written: {}", detail::system_reason());
    out.write(reinterpret_cast<const char*>(&header_size), sizeof(header_size));
    out.write(header.data(), static_cast<std::streamsize>(header_size));
    for (const auto& item : items) {
      const at::Tensor plain = item.tensor.cpu().resolve_conj().resolve_neg().contiguous();
      out.write(static_cast<const char*>(plain.const_data_ptr()), static_cast<std::streamsize>(plain.nbytes()));
    }
    out.close();
    check(out.good(), "cannot be written: {}", detail::system_reason());
    std::filesystem::rename(beside, path, error);
    check(!error, "cannot be written: {}", error.message());
  } catch (...) {
    std::filesystem::remove(beside, error);
    throw;
  }
}

}  // namespace xattn
