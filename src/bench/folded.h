// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include "bench/bench_layer.h"

namespace bench {

/// The orders of xattn in plain tensor operations, with all heads in as few and as large products as possible: code that a user
/// could write without this library. The orders used are those of fewest operations.
///
///                      logits                     values                  made ahead
///   standard           (Xq Wq)(Wk' Xk')        (P (Xv Wv)) Wo
///   fold_into_query    ((Xq Wq) Wk') Xk'       ((P Xv) Wv) Wo          with a learned query all of Xq Wq Wk'
///   prefold            (Xq (Wq Wk')) Xk'       (P Xv) (Wv Wo)          Wq Wk' and Wv Wo
///   fold_into_context  Xq (Wq (Wk' Xk'))       P ((Xv Wv) Wo)
class Folded {
 public:
  /// Makes products of weights ahead of calls; in training each call makes them, differentiably.
  Folded(const BenchLayer& layer, const xattn::Orders& orders);

  /// The tensors that depend on the context alone.
  struct Context {
    torch::Tensor keys;    ///< S [B, H, Lk, d]; F, P [B, Lk, Ek]; C [B, Eq, H * Lk]
    torch::Tensor bias;    ///< C: the part of the logits from the query's bias, [B, 1, H * Lk]
    torch::Tensor values;  ///< S [B, H, Lk, e]; F, P [B, Lk, Ek]; C [B, H * Lk, Eo]
  };
  Context context() const;
  Outputs attend(const Context& context) const;

 private:
  torch::Tensor logits(const Context& context) const;                                         // [B, H, Lq, Lk]
  torch::Tensor weighted_values(const torch::Tensor& weights, const Context& context) const;  // [B, H, Lq, Lk] -> [B, Lq, Eo]
  torch::Tensor project_query() const;                                                        // [B|1, H, Lq, d]

  const BenchLayer& layer_;
  xattn::Orders orders_;
  torch::Tensor q_, q_bias_;     // [Eq, H * d], [H * d]; scaled unless a norm follows
  torch::Tensor k_, v_;          // [Ek, G * d], [Ek, G * e]
  torch::Tensor k_bias_;         // [G * d]; undefined where it has no effect: it adds the same to a whole row of logits
  torch::Tensor o_, o_bias_;     // [H * e, Eo], [Eo]; the bias includes that of the values
  torch::Tensor k_heads_;        // [H, d, Ek]
  torch::Tensor v_heads_;        // [H, Ek, e]
  torch::Tensor qk_, qk_bias_;   // P [Eq, H * Ek], [H * Ek]
  torch::Tensor vo_;             // P [H * Ek, Eo]
  torch::Tensor learned_query_;  // a learned query: S [1, H, Lq, d], F [1, H * Lq, Ek]
};

}  // namespace bench
