// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>
#include <xattn/export.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>

namespace xattn::detail {

using Bytes = std::span<const std::byte>;

inline std::string_view as_text(Bytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// A file mapped into memory to read: what is not looked at is not read, whatever the size of the file. Holds no descriptor, so
/// that a set may have more files than a process may open.
class XATTN_API MappedFile {
 public:
  /// Throws FileError if it is not a regular file that can be read, or has more than `most` bytes.
  explicit MappedFile(const std::string& path, uint64_t most = std::numeric_limits<uint64_t>::max());
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  Bytes bytes() const { return bytes_; }

  /// Throws FileError if the file has another size, or was written to, since it was mapped: behind a new end there is no memory.
  /// A file that its path names no longer, since it was replaced or removed, is as it was.
  void check_unchanged() const;

 private:
  std::string path_;
  std::string place_;  // the same, whatever folder the process is in
  dev_t device_ = 0;
  ino_t number_ = 0;
  int64_t changed_ = 0;  // nanoseconds
  Bytes bytes_;
};

}  // namespace xattn::detail
