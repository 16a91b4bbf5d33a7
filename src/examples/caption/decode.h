// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>
#include <xattn/context.h>

#include <cstdint>
#include <vector>

#include "caption/model.h"

namespace caption {

/// The most probable captions that a search found, of B images.
struct Decoded {
  torch::Tensor words;            ///< int64 [B, T], kEnd behind the last word, padded with 0
  torch::Tensor log_probability;  ///< [B], the sum over the words
};

/// Writes captions word by word, of images as `look` made them. With one beam each next word is the most probable one (greedy
/// search); with n, the n most probable beginnings are kept. Beams share the contexts: nothing of an image is copied or made
/// again.
Decoded decode(Model& model, const std::vector<xattn::Context>& images, int64_t beams);

}  // namespace caption
