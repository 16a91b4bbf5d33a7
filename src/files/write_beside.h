// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <functional>
#include <iosfwd>
#include <string>
#include <string_view>

namespace xattn::detail {

/// Lets `write` fill a new file beside `path` through the stream it is given, and renames it: `path` holds either what it held
/// before or the whole new file, also after a loss of power. A file that is replaced keeps its permissions, and its owner where
/// the system allows it; a symbolic link stays one, and what it leads to is replaced. Throws FileError if that cannot be; leaves
/// nothing behind, whatever is thrown. A process that is killed meanwhile leaves the new file, ".NUMBER.tmp".
XATTN_API void write_beside(std::string_view reader, const std::string& path, const std::function<void(std::ostream&)>& write);

/// Throws the FileError of `write_beside` if a file of this path cannot be written: found out at the beginning of a long job
/// rather than at its end. Changes nothing. An empty path is no file.
XATTN_API void check_writable(std::string_view reader, const std::string& path);

}  // namespace xattn::detail
