// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <string>

// Pictures are uint8 tensors [height, width, 3], red, green, blue.
namespace examples {

/// Reads a PNG of any kind: grey and palettes become RGB, transparent pixels are blended with white, 16 bits become 8. Throws
/// std::runtime_error, naming the file, if it is not a regular file that can be read, is not a PNG, is damaged, or has more
/// than 64 million pixels.
torch::Tensor read_png(const std::string& path);

/// The bytes of a PNG file. Throws c10::ValueError unless the picture is uint8 [height, width, 3] with at least one pixel.
std::string encode_png(const torch::Tensor& picture);

/// Writes `encode_png(picture)` with `write_file`, and throws their errors.
void write_png(const std::string& path, const torch::Tensor& picture);

}  // namespace examples
