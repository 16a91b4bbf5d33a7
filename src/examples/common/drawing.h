// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>

#include "common/report.h"

namespace examples {

inline constexpr int64_t kCharacterWidth = 12;   ///< pixels from one character to the next
inline constexpr int64_t kCharacterHeight = 18;  ///< pixels

/// Draws one line of text in dark ink, clipped to the picture, with its upper left corner at (y, x) in pixels. Capitals are drawn
/// in lower case, characters without a glyph as blanks.
void draw_text(const torch::Tensor& picture, int64_t y, int64_t x, const std::string& text);

/// The example as a picture, uint8 [height, width, 3]: the question or sentence and the answer, the board, and the board under
/// the attention map of the whole answer (if there is one) and of each word.
torch::Tensor draw_example(const Example& example);

}  // namespace examples
