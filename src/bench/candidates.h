// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/frozen.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "bench/bench_layer.h"

namespace bench {

/// One way to compute a row.
struct Candidate {
  std::string name;
  std::function<Outputs()> call;
  std::vector<torch::Tensor> leaves = {};     ///< the tensors that get gradients
  bool leaves_of_layer = true;                ///< whether these are layer.leaves(), so that their gradients are compared
  bool holds_logits = false;                  ///< keeps the logits of all heads in memory
  bool rounds = false;                        ///< stores numbers with fewer digits than the layer has
  std::string absent = {};                    ///< why it cannot run this row, or empty
  std::optional<int64_t> context_bytes = {};  ///< memory of the contexts that a frozen module of a block row keeps

  /// Whose threads compute it: xattn or libtorch.
  std::string runtime() const { return name == "module" || name.starts_with("frozen") ? "xattn" : "libtorch"; }
};

/// All candidates, for a layer that outlives them:
///   eager    linear, matmul, softmax, matmul, linear
///   sdpa     at::scaled_dot_product_attention between linears; on CUDA also with each of its backends alone
///   mha      torch::nn::MultiheadAttention
///   folded   the order of fewest operations, on LibTorch's operators: code that a user could write without this library
///   module   xattn::CrossAttention
///   frozen   xattn::Frozen, made from the module; on a CPU, where a context is kept, also with weights and context in bfloat16
std::vector<Candidate> candidates(const BenchLayer& layer);

/// A call of a frozen layer, as the row is timed. If the row keeps its context, the context is made now.
std::function<Outputs()> call_of(const BenchLayer& layer, const xattn::Frozen& frozen);

}  // namespace bench
