// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "base/text.h"
#include "files/check_file.h"
#include "files/json.h"
#include "files/readers.h"
#include "files/safetensors_format.h"
#include "files/types.h"

namespace xattn::detail {
namespace {

// The description of one tensor in the header.
struct HeaderEntry {
  std::optional<std::string> type;
  std::optional<std::vector<uint64_t>> shape;
  std::optional<std::vector<uint64_t>> offsets;
};

// Reads the header token by token, without building a tree in memory, and throws at a token that is not allowed at its place.
// Nothing can therefore nest deeper than the format, and duplicate names are noticed.
class HeaderParser : public JsonEvents {
 public:
  explicit HeaderParser(const std::string& path) : check_(kSafetensors, path) {}

  std::map<std::string, HeaderEntry> records;
  std::map<std::string, std::string> metadata;

  void start_object() override {
    if (level_ == 2) refuse();
    ++level_;
  }

  void key(std::string key) override {
    if (level_ == 1) {
      const bool is_new = key == kSafetensorsMetadata ? !std::exchange(has_metadata_, true) : records.try_emplace(key).second;
      check_(is_new, "has the name {} twice", in_quotes(key));
      name_ = std::move(key);
      return;
    }
    if (name_ == kSafetensorsMetadata) {
      check_(metadata.try_emplace(key).second, "has the metadata {} twice", in_quotes(key));
    } else {
      check_(key == "dtype" || key == "shape" || key == "data_offsets",
             "tensor {} must have dtype, shape and data_offsets only, but has {}", in_quotes(name_), in_quotes(key));
    }
    field_ = std::move(key);
  }

  void string(std::string value) override {
    if (level_ != 2 || in_list_ || (name_ != kSafetensorsMetadata && field_ != "dtype")) refuse();
    if (name_ == kSafetensorsMetadata) {
      metadata[field_] = std::move(value);
    } else {
      set(records[name_].type, std::move(value));
    }
  }

  void start_list() override {
    if (level_ != 2 || in_list_ || name_ == kSafetensorsMetadata || field_ == "dtype") refuse();
    in_list_ = true;
  }

  void number(std::string_view text) override {
    const auto value = json_number<uint64_t>(text);
    if (!value || !in_list_ || list_.size() == kMaxAxes) refuse();
    list_.push_back(*value);
  }

  void end_list() override {
    if (field_ == "data_offsets" && list_.size() != 2) refuse();
    set(field_ == "shape" ? records[name_].shape : records[name_].offsets, list_);
    list_.clear();
    in_list_ = false;
  }

  void end_object() override {
    if (level_-- == 2 && name_ != kSafetensorsMetadata) {
      const auto& [type, shape, offsets] = records[name_];
      check_(type && shape && offsets, "tensor {} must have dtype, shape and data_offsets, but lacks {}", in_quotes(name_),
             !type ? "dtype" : (!shape ? "shape" : "data_offsets"));
    }
  }

  void null() override {
    if (level_ != 1 || name_ != kSafetensorsMetadata) refuse();  // some writers have null for no metadata
  }
  void boolean(bool) override { refuse(); }

 private:
  // Throws for a token that is not allowed here; the message names the allowed ones.
  [[noreturn]] void refuse() const {
    check_(level_ == 2, "the value of {} must be an object", in_quotes(name_));
    check_(name_ != kSafetensorsMetadata, "metadata {} must be a string", in_quotes(field_));
    const auto wanted = field_ == "dtype"   ? "a string"
                        : field_ == "shape" ? "a list of at most 64 non-negative integers"
                                            : "a list of two non-negative integers";
    check_.fail("{} of tensor {} must be {}", field_, in_quotes(name_), wanted);
  }

  template <typename T>
  void set(std::optional<T>& field, T value) const {
    check_(!field, "tensor {} has {} twice", in_quotes(name_), field_);
    field = std::move(value);
  }

  FileCheck check_;
  bool has_metadata_ = false;
  int level_ = 0;               // of objects: 1 names, 2 fields
  std::string name_;            // at level 1
  std::string field_;           // at level 2
  bool in_list_ = false;        // inside a field
  std::vector<uint64_t> list_;  // read so far
};

// The bits of an element of types that torch has no tensors of; nothing for types that the format does not name.
std::optional<uint64_t> bits_of_other_type(std::string_view type) {
  if (type == "F4") return 4;
  return type == "F6_E2M3" || type == "F6_E3M2" ? std::optional<uint64_t>(6) : std::nullopt;
}

// The tensors in the data of a file. As the format requires, they must fill the data exactly.
Index laid_out(const std::string& path, const std::map<std::string, HeaderEntry>& records, Bytes data) {
  const FileCheck check(kSafetensors, path);
  struct Place {
    std::string_view name;
    uint64_t begin;
    uint64_t end;
  };
  Index index;
  std::vector<Place> in_order;
  for (const auto& [name, record] : records) {
    const uint64_t begin = record.offsets->at(0);
    const uint64_t end = record.offsets->at(1);
    const auto text = formatted("[{}]", joined(*record.shape));
    check(begin <= end, "tensor {} ends at {} before it begins at {}", in_quotes(name), end, begin);
    check(end <= data.size(), "tensor {} ends at {}, beyond the file's {} bytes of data; a download may have been cut off",
          in_quotes(name), end, data.size());
    // Sizes from 2^63 on become negative, which count_elements rejects.
    std::vector<int64_t> shape(record.shape->begin(), record.shape->end());
    const auto* type =
        find_type([&dtype = *record.type](const FileType& each) { return !dtype.empty() && each.safetensors == dtype; });
    const auto bits =
        type != nullptr ? std::optional<uint64_t>(8 * c10::elementSize(type->type)) : bits_of_other_type(*record.type);
    const auto elements = count_elements(shape);
    uint64_t all_bits = 0;
    check(elements && !__builtin_mul_overflow(static_cast<uint64_t>(*elements), bits.value_or(1), &all_bits),
          "shape {} of tensor {} has too many elements to count", text, in_quotes(name));
    const auto bytes = all_bits / 8 + (all_bits % 8 != 0 ? 1 : 0);
    check(!bits || bytes == end - begin,
          "tensor {} of type {} and shape {} takes {} bytes, but its data_offsets [{}, {}] hold {}", in_quotes(name),
          shown(*record.type), text, bytes, begin, end, end - begin);
    in_order.push_back({name, begin, end});
    if (type == nullptr) {
      index.unreadable.emplace(name, formatted("it is of dtype {}, which torch does not have", in_quotes(*record.type)));
      continue;
    }
    auto strides = contiguous_strides(shape);
    index.tensors.emplace(name, StoredTensor{type->type, std::move(shape), std::move(strides), data.subspan(begin, bytes)});
  }

  std::ranges::sort(in_order, {}, [](const Place& place) { return std::pair(place.begin, place.end); });
  uint64_t filled = 0;
  for (const auto& [name, begin, end] : in_order) {
    check(begin >= filled, "tensor {} begins at {}, inside another that ends at {}", in_quotes(name), begin, filled);
    check(begin == filled, "tensor {} begins at {}, but the one before it ends at {}", in_quotes(name), begin, filled);
    filled = end;
  }
  check(filled == data.size(), "has {} bytes of data, but its tensors end at {}", data.size(), filled);
  return index;
}

}  // namespace

Index read_safetensors(const std::string& path, Bytes file) {
  const FileCheck check(kSafetensors, path);
  uint64_t header_size = 0;
  check(file.size() >= sizeof(header_size), "must begin with a header length of 8 bytes, but has {} bytes", file.size());
  std::memcpy(&header_size, file.data(), sizeof(header_size));
  const auto after_length = file.subspan(sizeof(header_size));
  check(header_size <= after_length.size(), "header length {} exceeds the file's {} bytes; a download may have been cut off",
        header_size, file.size());
  check(header_size <= kMaxSafetensorsHeader, "header length {} exceeds the format's limit of {}", header_size,
        kMaxSafetensorsHeader);

  const auto header = as_text(after_length.first(header_size));
  check(header.starts_with('{'), "header must begin with '{{'");
  HeaderParser parser(path);
  read_json(header, check, "header ", parser);
  auto index = laid_out(path, parser.records, after_length.subspan(header_size));
  index.metadata = std::move(parser.metadata);
  return index;
}

}  // namespace xattn::detail
