// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <tuple>

#include "bench/bench_layer.h"

namespace bench {

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

}  // namespace bench
