// SPDX-License-Identifier: Apache-2.0
#include "common/drawing.h"

#include <xattn/attention_map.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "base/printed.h"
#include "font.txt.h"

// Pictures are uint8 [height, width, 3]: red, green, blue. Places are in pixels from the upper left corner, y first.
namespace examples {
namespace {

using torch::Tensor;
using Glyph = std::array<uint8_t, 9>;  // see data/font.txt

constexpr uint8_t kPaper = 255;
constexpr int64_t kGap = 20;
constexpr size_t kLongestHeadline = 400;         // bytes: a checkpoint may have words of any length
constexpr int64_t kScale = kCharacterWidth / 6;  // pixels of the picture for one of a glyph
constexpr int64_t kLine = (9 + 3) * kScale;      // from one line of text to the next

// A picture with a line of text below it.
struct LabelledPicture {
  Tensor picture;
  std::string label;
};

std::map<char, Glyph> read_font() {
  std::map<char, Glyph> font;
  std::istringstream lines(kFontTxt);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("# ")) continue;
    std::istringstream numbers(line.substr(1));
    for (auto& row : font[line.at(0)]) {
      int bits = 0;
      numbers >> std::hex >> bits;
      row = static_cast<uint8_t>(bits);
    }
  }
  return font;
}

Tensor part(const Tensor& picture, int64_t y, int64_t x, int64_t height, int64_t width) {
  return picture.narrow(0, y, height).narrow(1, x, width);
}

// Draws the tiles, which have one size, row by row under some lines of text.
Tensor draw_tiles(const std::vector<std::string>& headlines, const std::vector<LabelledPicture>& tiles, int64_t columns) {
  const auto count = static_cast<int64_t>(tiles.size());
  const auto height = tiles.at(0).picture.size(0);
  const auto width = tiles.at(0).picture.size(1);
  const auto row_height = height + kLine + kGap;
  const auto top = kGap + static_cast<int64_t>(headlines.size()) * kLine + kGap / 2;
  auto all_width = kGap + std::min(columns, count) * (width + kGap);
  for (const auto& line : headlines) {
    all_width = std::max(all_width, static_cast<int64_t>(line.size()) * kCharacterWidth + 2 * kGap);
  }
  const auto picture = torch::full({top + (count + columns - 1) / columns * row_height, all_width, 3}, kPaper, torch::kUInt8);
  for (size_t i = 0; i < headlines.size(); ++i) draw_text(picture, kGap + static_cast<int64_t>(i) * kLine, kGap, headlines[i]);
  for (int64_t i = 0; i < count; ++i) {
    const auto& tile = tiles[static_cast<size_t>(i)];
    const auto y = top + i / columns * row_height;
    const auto x = kGap + i % columns * (width + kGap);
    const auto framed = part(picture, y, x, height, width);
    framed.copy_(torch::tensor({205, 205, 212}, torch::kUInt8));
    part(framed, 1, 1, height - 2, width - 2).copy_(part(tile.picture, 1, 1, height - 2, width - 2));
    draw_text(picture, y + height + 6, x, tile.label);
  }
  return picture;
}

}  // namespace

void draw_text(const Tensor& picture, int64_t y, int64_t x, const std::string& text) {
  static const auto font = read_font();
  const auto ink = torch::tensor({40, 40, 48}, torch::kUInt8);
  for (const char character : text) {
    const auto glyph = font.find(static_cast<char>(std::tolower(static_cast<unsigned char>(character))));
    for (int64_t pixel = 0; glyph != font.end() && pixel < 9 * 5; ++pixel) {
      const auto top = y + pixel / 5 * kScale;
      const auto left = x + pixel % 5 * kScale;
      const bool is_ink = glyph->second.at(static_cast<size_t>(pixel / 5)) >> (4 - pixel % 5) & 1;
      const bool is_inside = top + kScale <= picture.size(0) && left + kScale <= picture.size(1);
      if (is_ink && is_inside) part(picture, top, left, kScale, kScale).copy_(ink);
    }
    x += kCharacterWidth;
  }
}

torch::Tensor draw_example(const Example& example) {
  constexpr int64_t kColumns = 6;
  std::vector<LabelledPicture> tiles = {{example.picture, "the board"}};
  const auto add = [&](const Tensor& map, const std::string& label) {
    if (map.defined()) tiles.push_back({xattn::overlay_map(example.picture, map), label});
  };
  add(example.map, "the answer");
  for (const auto& word : example.words) add(word.map, word.text);
  std::vector<std::string> headlines = {xattn::detail::shown(example.title, kLongestHeadline)};
  if (!example.answer.empty()) headlines.push_back("answer: " + example.answer);
  return draw_tiles(headlines, tiles, kColumns);
}

}  // namespace examples
