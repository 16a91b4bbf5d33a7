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
using Outputs = std::tuple<torch::Tensor, torch::Tensor>;

/// One row with random numbers: the weights of a module, and the inputs.
struct BenchLayer {
  shapes::Shape shape;
  xattn::CrossAttention module = nullptr;
  torch::Tensor query;  ///< [B, Lq, Eq]; a learned query is a parameter [1, Lq, Eq]
  torch::Tensor key;    ///< [B, Lk, Ek]
  torch::Tensor value;  ///< [B, Lk, Ek]; the key itself if the row has one context
  torch::Tensor keep;   ///< bool [B, Lk], true = may attend; undefined without a mask
  torch::Tensor bias;   ///< the same mask, to be added to the logits: [B, 1, 1, Lk]
  torch::Tensor grad;   ///< gradient of the output, [B, Lq, Eo]; undefined unless gradients are timed

  /// The tensors that get a gradient: query, key, value if it is not the key, and all parameters.
  std::vector<torch::Tensor> leaves() const;

  /// The same numbers as float64.
  BenchLayer in_double() const;
};

BenchLayer make_layer(const shapes::Shape& shape, const torch::TensorOptions& options, xattn::AttentionWeights weights);

/// An upper bound on a candidate's memory, in 1e9 bytes; `logits`: whether it keeps the logits of all heads in memory.
double gigabytes_needed(const shapes::Shape& shape, bool logits, double element);

/// The mask of the row's padding.
xattn::Mask mask_of(const BenchLayer& layer);

}  // namespace bench
