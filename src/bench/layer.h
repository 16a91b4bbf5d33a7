// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>
#include <xattn/cross_attention.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "shapes.h"

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

/// Attention in plain tensor operations, as a good user writes it: the candidate `eager`, and in float64 the definition.
struct Eager {
  const Layer& layer;
  using Context = std::tuple<torch::Tensor, torch::Tensor>;  ///< k, v [B, G, Lk, d]
  Context context() const;
  torch::Tensor project_query() const;                       ///< [B|1, H, Lq, d]
  torch::Tensor project_output(const torch::Tensor&) const;  ///< [B, H, Lq, e] -> [B, Lq, Eo]
  Results attend(const Context& context) const;
};

/// As asked for by the options of the layer's module, from weights [B, H, Lq, Lk].
torch::Tensor wanted_weights(const Layer& layer, const torch::Tensor& weights);

/// What every candidate must give, in float64: of long queries at some places alone.
struct Exact {
  torch::Tensor places;  ///< int64, of the queries in `output` and `weights`
  torch::Tensor output;
  torch::Tensor weights;
  std::vector<torch::Tensor> grads;  ///< of layer.leaves(); empty unless gradients are timed
};
Exact exact(const Layer& layer);

}  // namespace bench
