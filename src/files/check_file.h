// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/file_error.h>

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/printed.h"
#include "base/text.h"

// Errors about files. Every message is one line of limited length: "[reader] path: what was expected and what was found".
namespace xattn::detail {

/// Checks for one reader and one file, which must outlive it:
///
///   const FileCheck check("zip", path);
///   check(size > 0, "must have entries, but has {}", size);
class FileCheck {
 public:
  FileCheck(std::string_view reader, std::string_view path) : reader_(reader), path_(path) {}

  /// Throws FileError with "[reader] path: message" unless `ok`. The message is formatted only if it is thrown.
  template <typename... Args>
  void operator()(bool ok, Format<Args...> format, Args&&... args) const {
    if (!ok) fail(format, std::forward<Args>(args)...);
  }

  template <typename... Args>
  [[noreturn]] void fail(Format<Args...> format, Args&&... args) const {
    throw FileError(one_line(formatted("[{}] {}: {}", reader_, path_, formatted(format, std::forward<Args>(args)...))));
  }

 private:
  std::string_view reader_;
  std::string_view path_;
};

/// "; missing: a, b", or nothing if there are no names. Lists at most a hundred names and the number of the others.
std::string list(std::string_view what, const std::vector<std::string>& names);

/// The operating system's text for this error, as in "No such file or directory".
std::string system_reason(int error);

}  // namespace xattn::detail
