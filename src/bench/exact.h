// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "bench/bench_layer.h"
#include "bench/candidates.h"

namespace bench {

/// module(x), with a call of LibTorch's that does no more.
torch::Tensor linear(const torch::nn::Linear& module, const torch::Tensor& x);

/// [B, L, n * size] -> [B, n, L, size], with the norm over what `over` says.
torch::Tensor split_heads(const torch::Tensor& x, int64_t n, shapes::NormOver over, const xattn::Norm& norm);

/// The weights that a row returns, from those of all heads, [B, H, Lq, Lk].
torch::Tensor returned_weights(const BenchLayer& layer, const torch::Tensor& weights);

/// Attention in plain tensor operations, as a careful user writes it: the candidate `eager` and, in float64, the definition.
struct Eager {
  const BenchLayer& layer;
  using Context = std::tuple<torch::Tensor, torch::Tensor>;  ///< k, v [B, G, Lk, d]
  Context context() const;
  torch::Tensor project_query() const;                       ///< [B|1, H, Lq, d]
  torch::Tensor project_output(const torch::Tensor&) const;  ///< [B, H, Lq, e] -> [B, Lq, Eo]
  Outputs attend(const Context& context) const;
};

/// The largest difference of two tensors, relative to the largest element of the second. Throws std::runtime_error if it is more
/// than rounding explains; `what` begins the message.
double compare(const std::string& what, const torch::Tensor& found, const torch::Tensor& expected, bool rounds);

/// The results that every candidate must reproduce, in float64; for a long query at some places only.
struct Exact {
  torch::Tensor places;  ///< int64, the places of `output` and `weights` in the query
  torch::Tensor output;
  torch::Tensor weights;
  std::vector<torch::Tensor> grads;  ///< gradients of layer.leaves(); empty unless gradients are timed
};
Exact exact(const BenchLayer& layer);

/// Calls a candidate once. Returns the largest error of output, weights and gradients, relative to the largest element of each.
/// Throws std::runtime_error if it is more than rounding explains.
double check(const Candidate& candidate, const BenchLayer& layer, const Exact& exact);

/// The timed function: the call, with the gradients if the row includes them.
std::function<void()> timed(const Candidate& candidate, const BenchLayer& layer);

}  // namespace bench
