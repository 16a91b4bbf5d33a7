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

/// A file mapped into memory for reading: only pages that are accessed are read. Holds no descriptor, so that a sharded set may
/// have more files than a process may open.
class XATTN_API MappedFile {
 public:
  /// Throws FileError if it is not a regular file that can be read, or has more than `most` bytes.
  explicit MappedFile(const std::string& path, uint64_t most = std::numeric_limits<uint64_t>::max());
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::string& path() const { return path_; }
  Bytes bytes() const { return bytes_; }

  /// Throws FileError if the file was written to or changed its size since it was mapped: access beyond a new end would crash.
  /// A file that was replaced or removed is unchanged: the mapping keeps the old one.
  void check_unchanged() const;

  /// Returns the memory of the whole pages within `part` to the system; does nothing for bytes of another file. The next access
  /// reads them again.
  void release(Bytes part) const;

 private:
  std::string path_;
  std::string place_;  // the absolute path, since the process may change its folder
  dev_t device_ = 0;
  ino_t number_ = 0;
  int64_t changed_ = 0;  // nanoseconds
  Bytes bytes_;
};

}  // namespace xattn::detail
