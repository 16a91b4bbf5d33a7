// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <array>
#include <cstdint>
#include <string>

// Pictures are uint8 tensors [height, width, 3], red, green, blue. Places are pixels from the upper left corner, y first.
namespace examples {

using Color = std::array<uint8_t, 3>;

struct Box {
  int64_t y;
  int64_t x;
  int64_t height;
  int64_t width;
};

torch::Tensor make_picture(int64_t height, int64_t width, Color color);

/// The part of the picture under the box, which must lie inside: a view to write to.
torch::Tensor part(const torch::Tensor& picture, const Box& box);

void fill(const torch::Tensor& picture, const Box& box, Color color);

/// A frame of `line` pixels, inside the box.
void draw_frame(const torch::Tensor& picture, const Box& box, int64_t line, Color color);

/// One line of text from (y, x) on; what lies outside the picture is left out. Capitals are drawn as small letters, characters
/// without a glyph as blanks.
void draw_text(const torch::Tensor& picture, int64_t y, int64_t x, const std::string& text, int64_t scale, Color color);

inline constexpr int64_t kTextHeight = 9;  ///< at scale 1
inline constexpr int64_t kTextWidth = 6;   ///< of one character, at scale 1

}  // namespace examples
