// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include "common/report.h"

namespace examples {

/// The example as a picture, uint8 [height, width, 3]: the question or sentence and the answer, the board, and the board under
/// the attention map of the whole answer (if there is one) and of each word. Capitals are drawn in lower case, characters
/// without a glyph as blanks.
torch::Tensor draw_example(const Example& example);

}  // namespace examples
