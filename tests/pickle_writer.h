// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "zip_writer.h"

/// Parts of pickles; see Python's pickletools. Each function returns instructions that leave one value on the stack.
namespace xattn::test::pickle {

inline std::string text(std::string_view value) {
  return "X" + little_endian(value.size(), 4) + std::string(value);
}

inline std::string integer(int64_t value) {
  return "\x8a\x08" + little_endian(static_cast<uint64_t>(value), 8);
}

inline std::string tuple(const std::string& items) {
  return "(" + items + "t";
}

inline std::string integers(const std::vector<int64_t>& values) {
  std::string items;
  for (const auto value : values) items += integer(value);
  return tuple(items);
}

/// A dict of keys and values.
inline std::string dict(const std::string& items) {
  return "}(" + items + "u";
}

inline std::string global(const std::string& module, const std::string& name) {
  return "c" + module + "\n" + name + "\n";
}

inline std::string call(const std::string& function, const std::string& arguments) {
  return function + tuple(arguments) + "R";
}

inline std::string storage(const std::string& type, const std::string& key, int64_t elements) {
  return tuple(text("storage") + global("torch", type) + text(key) + text("cpu") + integer(elements)) + "Q";
}

/// A view of a storage.
inline std::string tensor(const std::string& storage,
                          const std::vector<int64_t>& shape,
                          const std::vector<int64_t>& strides,
                          int64_t offset = 0) {
  return call(global("torch._utils", "_rebuild_tensor_v2"), storage + integer(offset) + integers(shape) + integers(strides) +
                                                                "\x89" + call(global("collections", "OrderedDict"), ""));
}

/// The float32 tensor [0, 0] of storage 0, which has 8 bytes.
inline std::string two_zeros() {
  return tensor(storage("FloatStorage", "0", 2), {2}, {1});
}

/// A module in TorchScript.
inline std::string object(const std::string& attributes) {
  return global("__torch__", "Module") + ")\x81" + dict(attributes) + "b";
}

inline std::string whole(const std::string& value) {
  return "\x80\x02" + value + ".";
}

/// An archive of torch.save that holds this value, and a storage 0 of 8 bytes.
inline std::string archive(const std::string& value, const std::vector<std::pair<std::string, std::string>>& more = {}) {
  std::vector<std::pair<std::string, std::string>> entries = {{"archive/data.pkl", whole(value)},
                                                              {"archive/data/0", std::string(8, '\0')}};
  entries.insert(entries.end(), more.begin(), more.end());
  return zip_of(entries);
}

}  // namespace xattn::test::pickle
