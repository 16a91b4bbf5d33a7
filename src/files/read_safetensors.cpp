// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <optional>
#include <string_view>
#include <utility>

#include "base/text.h"
#include "files/check_file.h"
#include "files/json_reader.h"
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

// Reads the header without building a tree in memory. Nothing can nest deeper than the format, and duplicate names are noticed.
class HeaderReader {
 public:
  HeaderReader(std::string_view header, const FileCheck& check) : check_(check), json_(header, check, "header ") {}

  void read() {
    bool has_metadata = false;
    json_.object([&](const std::string& name) {
      const auto quoted = [&name] { return in_quotes(name); };
      const bool is_metadata = name == kSafetensorsMetadata;
      const bool is_new = is_metadata ? !std::exchange(has_metadata, true) : records.try_emplace(name).second;
      check_(is_new, "has the name {} twice", quoted);
      if (is_metadata && json_.next() == 'n') return json_.word("null");  // some writers have null for no metadata
      check_(json_.next() == '{', "the value of {} must be an object", quoted);
      is_metadata ? read_metadata() : read_record(name, records[name]);
    });
    json_.end();
  }

  std::map<std::string, HeaderEntry> records;
  std::map<std::string, std::string> metadata;

 private:
  void read_metadata() {
    json_.object([&](const std::string& key) {
      const auto quoted = [&key] { return in_quotes(key); };
      const auto [place, is_new] = metadata.try_emplace(key);
      check_(is_new, "has the metadata {} twice", quoted);
      check_(json_.next() == '"', "metadata {} must be a string", quoted);
      place->second = json_.string();
    });
  }

  void read_record(const std::string& name, HeaderEntry& entry) {
    const auto quoted = [&name] { return in_quotes(name); };
    json_.object([&](const std::string& field) {
      const auto require = [&](bool ok, std::string_view wanted) {
        check_(ok, "{} of tensor {} must be {}", field, quoted, wanted);
      };
      const auto set = [&](auto& value, auto read) {
        check_(!std::exchange(value, std::move(read)), "tensor {} has {} twice", quoted, field);
      };
      if (field == "dtype") {
        require(json_.next() == '"', "a string");
        set(entry.type, json_.string());
      } else if (field == "shape") {
        constexpr std::string_view kWanted = "a list of at most 64 non-negative integers";
        set(entry.shape, numbers(kMaxAxes, [&](bool ok) { require(ok, kWanted); }));
      } else {
        check_(field == "data_offsets", "tensor {} must have dtype, shape and data_offsets only, but has {}", quoted,
               in_quotes(field));
        const auto is_pair = [&](bool ok) { require(ok, "a list of two non-negative integers"); };
        set(entry.offsets, numbers(2, is_pair));
        is_pair(entry.offsets->size() == 2);
      }
    });
    const auto& [type, shape, offsets] = entry;
    check_(type && shape && offsets, "tensor {} must have dtype, shape and data_offsets, but lacks {}", quoted,
           !type ? "dtype" : (!shape ? "shape" : "data_offsets"));
  }

  // A list of at most `most` numbers; `require(false)` throws if the value is another.
  template <class Require>
  std::vector<uint64_t> numbers(size_t most, const Require& require) {
    std::vector<uint64_t> numbers;
    require(json_.next() == '[');
    json_.list([&] {
      const char first = json_.next();
      require(first == '-' || (first >= '0' && first <= '9'));
      const auto number = json_number<uint64_t>(json_.number());
      require(number && numbers.size() < most);
      numbers.push_back(*number);
    });
    return numbers;
  }

  const FileCheck& check_;
  JsonReader json_;
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
  HeaderReader reader(header, check);
  reader.read();
  auto index = laid_out(path, reader.records, after_length.subspan(header_size));
  index.metadata = std::move(reader.metadata);
  return index;
}

}  // namespace xattn::detail
