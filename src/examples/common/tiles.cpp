// SPDX-License-Identifier: Apache-2.0
#include "common/tiles.h"

#include <xattn/attention_map.h>

#include <algorithm>

#include "base/printed.h"
#include "common/canvas.h"

namespace examples {
namespace {

constexpr Color kPaper = {255, 255, 255};
constexpr Color kInk = {40, 40, 48};
constexpr Color kLines = {205, 205, 212};
constexpr int64_t kGap = 20;
constexpr size_t kMostOfHeadline = 400;                // bytes: a checkpoint may have words of any length
constexpr int64_t kScale = 2;                          // of the text
constexpr int64_t kLine = (kTextHeight + 3) * kScale;  // from one line of text to the next

int64_t text_width(const std::string& text) {
  return static_cast<int64_t>(text.size()) * kTextWidth * kScale;
}

}  // namespace

torch::Tensor draw_tiles(const std::vector<std::string>& headlines, const std::vector<Tile>& tiles, int64_t columns) {
  const auto count = static_cast<int64_t>(tiles.size());
  const auto height = tiles.at(0).picture.size(0);
  const auto width = tiles.at(0).picture.size(1);
  const auto row_height = height + kLine + kGap;
  const auto top = kGap + static_cast<int64_t>(headlines.size()) * kLine + kGap / 2;
  auto all_width = kGap + std::min(columns, count) * (width + kGap);
  for (const auto& line : headlines) all_width = std::max(all_width, text_width(line) + 2 * kGap);

  const auto picture = make_picture(top + (count + columns - 1) / columns * row_height, all_width, kPaper);
  for (size_t i = 0; i < headlines.size(); ++i) {
    draw_text(picture, kGap + static_cast<int64_t>(i) * kLine, kGap, headlines[i], kScale, kInk);
  }
  for (int64_t i = 0; i < count; ++i) {
    const auto& tile = tiles[static_cast<size_t>(i)];
    const Box box = {top + i / columns * row_height, kGap + i % columns * (width + kGap), height, width};
    part(picture, box).copy_(tile.picture);
    draw_frame(picture, box, 1, kLines);
    draw_text(picture, box.y + height + 6, box.x, tile.label, kScale, kInk);
  }
  return picture;
}

torch::Tensor draw_example(const Example& example) {
  constexpr int64_t kColumns = 6;
  std::vector<Tile> tiles = {{example.picture, "the board"}};
  const auto add = [&](const torch::Tensor& map, const std::string& label) {
    if (map.defined()) tiles.push_back({xattn::overlay_map(example.picture, map), label});
  };
  add(example.map, "the answer");
  for (const auto& word : example.words) add(word.map, word.text);
  std::vector<std::string> headlines = {xattn::detail::shown(example.title, kMostOfHeadline)};
  if (!example.answer.empty()) headlines.push_back("answer: " + example.answer);
  return draw_tiles(headlines, tiles, kColumns);
}

}  // namespace examples
