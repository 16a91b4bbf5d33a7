// SPDX-License-Identifier: Apache-2.0
#include "common/canvas.h"

#include <algorithm>
#include <cctype>
#include <iterator>

#include "common/font.h"

namespace examples {
namespace {

torch::Tensor as_tensor(Color color) {
  return torch::tensor(torch::ArrayRef<uint8_t>(color.data(), color.size()), torch::kUInt8);  // [3]
}

}  // namespace

torch::Tensor make_picture(int64_t height, int64_t width, Color color) {
  return as_tensor(color).repeat({height, width, 1});  // [height, width, 3]
}

torch::Tensor part(const torch::Tensor& picture, const Box& box) {
  return picture.narrow(0, box.y, box.height).narrow(1, box.x, box.width);
}

void fill(const torch::Tensor& picture, const Box& box, Color color) {
  part(picture, box).copy_(as_tensor(color));
}

void draw_frame(const torch::Tensor& picture, const Box& box, int64_t line, Color color) {
  const auto [y, x, height, width] = box;
  fill(picture, {y, x, line, width}, color);
  fill(picture, {y + height - line, x, line, width}, color);
  fill(picture, {y, x, height, line}, color);
  fill(picture, {y, x + width - line, height, line}, color);
}

void draw_text(const torch::Tensor& picture, int64_t y, int64_t x, const std::string& text, int64_t scale, Color color) {
  const Box all = {0, 0, picture.size(0), picture.size(1)};
  for (size_t i = 0; i < text.size(); ++i) {
    const auto character = static_cast<char>(std::tolower(static_cast<unsigned char>(text[i])));
    const auto* glyph = std::find_if(std::begin(kFont), std::end(kFont),
                                     [character](const Glyph& known) { return known.character == character; });
    if (glyph == std::end(kFont)) {
      continue;
    }
    for (int64_t row = 0; row < 9; ++row) {
      for (int64_t column = 0; column < 5; ++column) {
        const auto top = y + row * scale;
        const auto left = x + (static_cast<int64_t>(i) * kTextWidth + column) * scale;
        const bool ink = glyph->rows[row] >> (4 - column) & 1;
        if (ink && top >= 0 && left >= 0 && top + scale <= all.height && left + scale <= all.width) {
          fill(picture, {top, left, scale, scale}, color);
        }
      }
    }
  }
}

}  // namespace examples
