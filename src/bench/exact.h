// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <vector>

#include "bench/bench_layer.h"
#include "bench/candidates.h"

namespace bench {

/// What every candidate must give, in float64: of long queries at some places alone.
struct Exact {
  torch::Tensor places;  ///< int64, of the queries in `output` and `weights`
  torch::Tensor output;
  torch::Tensor weights;
  std::vector<torch::Tensor> grads;  ///< of layer.leaves(); empty unless gradients are timed
};
Exact exact(const Layer& layer);

/// Calls a candidate once and gives its largest error, of output, weights and gradients, relative to the largest element of each.
/// Throws std::runtime_error if that is more than rounding explains.
double check(const Candidate& candidate, const Layer& layer, const Exact& exact);

/// What is timed: the call, with the gradients where the row wants them.
std::function<void()> timed(const Candidate& candidate, const Layer& layer);

}  // namespace bench
