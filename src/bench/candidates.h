// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "bench/bench_layer.h"

namespace bench {

/// One way to compute a row.
struct Candidate {
  std::string name;
  std::function<Results()> call;
  std::vector<torch::Tensor> leaves;  ///< gets gradients; those of layer.leaves() that have the same place are compared
  size_t compared = 0;                ///< how many of the leaves are those of the layer
  bool holds_logits = false;          ///< of all heads, in memory
  bool rounds = false;                ///< numbers to a type of fewer digits than those of the layer
  std::string absent;                 ///< why it cannot run this row, or empty
};

/// All of them, for a layer that outlives them:
///   eager    linear, matmul, softmax, matmul, linear
///   sdpa     at::scaled_dot_product_attention between linears; on CUDA also each of its backends
///   mha      torch::nn::MultiheadAttention
///   folded   the cheapest order of products in plain tensor operations
///   module   xattn::CrossAttention
///   frozen   xattn::Frozen, made of it; on a CPU, where a context is kept, also with what it keeps stored in bfloat16
std::vector<Candidate> candidates(const Layer& layer);

}  // namespace bench
