// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/report.h"

namespace examples {

/// A picture with a line of text below it.
struct Tile {
  torch::Tensor picture;  ///< uint8 [height, width, 3]; all tiles are of one size
  std::string label;
};

/// The tiles row by row under some lines of text: uint8 [height, width, 3].
torch::Tensor draw_tiles(const std::vector<std::string>& headlines, const std::vector<Tile>& tiles, int64_t columns);

/// The example as a picture: what is asked and answered, the board, and over it where the model looked, for the whole answer
/// (if there is such a map) and for each word.
torch::Tensor draw_example(const Example& example);

}  // namespace examples
