// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <string>
#include <string_view>

#include "files/mapped_file.h"

namespace xattn::detail {

/// The directory of a zip archive, read and checked: each entry and its bytes, whose checksum is not verified. Stored entries
/// and zip64; one disk; no encryption. Names in the directory and before the data must agree, entries must not overlap, and
/// offsets and sizes must lie in the file. PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.
class ZipFile {
 public:
  struct Entry {
    Bytes bytes;              ///< as stored, compressed or not
    bool compressed = false;  ///< by any method
  };

  /// Throws FileError with "[zip] path: reason" for each defect.
  ZipFile(const std::string& path, Bytes file);

  /// By full name, as in "archive/data.pkl".
  const std::map<std::string, Entry>& entries() const { return entries_; }

  /// The folder that contains all entries, as PyTorch writes its archives, "archive/"; empty if there is none.
  const std::string& folder() const { return folder_; }

  bool has(std::string_view name) const;  ///< in the folder, as in "data.pkl"

  /// The bytes of an entry of the folder. Throws FileError if there is none, or if it is compressed.
  Bytes bytes(std::string_view name) const;

 private:
  std::string path_;
  std::map<std::string, Entry> entries_;
  std::string folder_;
};

}  // namespace xattn::detail
