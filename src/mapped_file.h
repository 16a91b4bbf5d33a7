// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>

namespace xattn::detail {

using Bytes = std::span<const std::byte>;

inline std::string_view as_text(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// A file mapped into memory to read: what is not looked at is not read, whatever the size of the file.
class MappedFile {
 public:
  /// Throws FileError if it is not a regular file that can be read.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  Bytes bytes() const { return bytes_; }

  /// Throws FileError if the file has another size, or was written to, since it was mapped: behind a new end there is no memory.
  void check_unchanged() const;

 private:
  std::string path_;
  int descriptor_ = -1;
  int64_t changed_ = 0;  // nanoseconds
  Bytes bytes_;
};

}  // namespace xattn::detail
