// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <functional>
#include <iosfwd>
#include <string>
#include <string_view>

namespace xattn::detail {

/// Calls `write` with a stream into a new file beside `path`, then renames it: `path` holds either the old file or the whole
/// new one, even after a loss of power. A file that is replaced keeps its permissions, and its owner if the system allows it; a
/// symbolic link stays one, and its target is replaced. Throws FileError if the file cannot be written; leaves nothing behind,
/// whatever is thrown. A process that is killed meanwhile leaves the new file, ".NUMBER.tmp".
XATTN_API void write_beside(std::string_view reader, const std::string& path, const std::function<void(std::ostream&)>& write);

/// Throws the FileError of `write_beside` if a file of this path cannot be written, so that a long job fails at its beginning
/// and not at its end. Changes nothing. Ignores an empty path.
XATTN_API void check_writable(std::string_view reader, const std::string& path);

}  // namespace xattn::detail
