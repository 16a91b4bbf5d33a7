// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace examples {

/// Writes a temporary file and renames it, so that `path` holds either all of the bytes or its old content; see write_beside.h.
/// Throws xattn::FileError, naming the file, if it cannot be written; program::Interrupted if a signal requested a stop.
void write_file(const std::string& path, std::string_view bytes);

/// Throws xattn::FileError if a file of this path could not be written, for the beginning of a long job. Ignores an empty path.
void check_output(const std::string& path);

}  // namespace examples
