// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>
#include <xattn/cross_attention.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "programs/shapes.h"

namespace bench {

/// Output [B, Lq, Eo] and attention weights: [B, Lq, Lk], [B, H, Lq, Lk] or undefined.
using Results = std::tuple<torch::Tensor, torch::Tensor>;

/// A row made of random numbers: the weights, in a module, and the inputs.
struct Layer {
  shapes::Shape shape;
  xattn::CrossAttention module = nullptr;
  torch::Tensor query;  ///< [B, Lq, Eq]; a learned query is a parameter [1, Lq, Eq]
  torch::Tensor key;    ///< [B, Lk, Ek]
  torch::Tensor value;  ///< [B, Lk, Ek]; of a single context the same tensor
  torch::Tensor keep;   ///< bool [B, Lk], true = may attend; undefined without a mask
  torch::Tensor bias;   ///< the same to be added to logits, [B, 1, 1, Lk]
  torch::Tensor grad;   ///< gradient of the output, [B, Lq, Eo]; undefined unless gradients are timed

  /// What gets a gradient: query, key, value if it is not the key, and all parameters.
  std::vector<torch::Tensor> leaves() const;

  /// The same numbers as float64.
  Layer in_double() const;
};

Layer make_layer(const shapes::Shape& shape, const torch::TensorOptions& options, xattn::AttentionWeights weights);

/// What a candidate holds at a time, at most, in 1e9 bytes; `logits` tells whether it has those of all heads in memory.
double gigabytes_needed(const shapes::Shape& shape, bool logits, double element);

/// Of its padding.
xattn::Mask mask_of(const Layer& layer);

}  // namespace bench
