// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace examples {

/// Writes beside and renames, so that `path` holds either all of the bytes or what it held before.
/// Throws std::runtime_error, naming the file, if it cannot be written.
void write_file(const std::string& path, std::string_view bytes);

/// Throws std::runtime_error if there is no folder for a file of this path: found out at the beginning of a long job rather
/// than at its end. An empty path is no file.
void check_folder(const std::string& path);

}  // namespace examples
