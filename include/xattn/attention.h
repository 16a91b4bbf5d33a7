// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/export.h>
#include <xattn/mask.h>

#include <optional>
#include <vector>

// Symbols used throughout the library:
//   B batch          H heads            G key/value heads (H is a multiple of G)
//   Lq query length  Lk context length  (keys and values come in pairs, so there is one Lk)
//   Eq, Ek, Ev       features of query, key, value       Eo features of the output
//   d  size of one query/key head       e  size of one value head

namespace xattn {

/// Which attention weights to return. They are taken before dropout, so each row sums to one, or to zero if it has no keys.
enum class AttentionWeights {
  none,      ///< an undefined tensor: the fastest choice
  mean,      ///< the mean over heads, [B, Lq, Lk]
  per_head,  ///< [B, H, Lq, Lk], or [B, n, Lq, Lk] of n chosen heads
};

/// Which implementation runs. Fused kernels give the same result as the definition, up to rounding.
enum class AttentionPath {
  automatic,   ///< a fused kernel if one supports the call, otherwise the definition
  definition,  ///< plain tensor operations
  fused,       ///< a fused kernel; throws c10::ValueError with the reason if there is none (dropout, gradients of weights, ...)
};

struct AttentionOptions {
  Mask mask = {};
  std::optional<double> scale = {};                   ///< multiplies the logits; default 1/sqrt(d)
  double dropout = 0;                                 ///< probability of dropping a weight; applied whenever it is above 0
  AttentionWeights weights = AttentionWeights::none;  ///< which weights to return
  std::vector<int64_t> weight_heads = {};             ///< with per_head: the heads to return, in this order; all if empty
  bool log_sum_exp = false;                           ///< whether to return the log-sum-exp
  AttentionPath path = AttentionPath::automatic;
};

struct AttentionResult {
  at::Tensor output;       ///< [B, H, Lq, e]
  at::Tensor weights;      ///< undefined, [B, Lq, Lk], [B, H, Lq, Lk], or [B, n, Lq, Lk] of n weight_heads; differentiable
  at::Tensor log_sum_exp;  ///< [B, H, Lq], at least float32, -inf for a row without keys; differentiable
};

/// Scaled dot-product attention over heads:
///
///   weights = softmax(scale * q k' + bias, over the keys that the mask allows)      output = dropout(weights) v
///
/// Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762. With G < H key/value heads, H/G query
/// heads share one: Ainslie et al., GQA, 2023, https://arxiv.org/abs/2305.13245.
///
/// q [B, H, Lq, d], k [B, G, Lk, d], v [B, G, Lk, e], all of one floating point type and on one device. Strides are arbitrary,
/// and axes may have size 0.
///
/// For float32 on the CPU (with AVX2 or AVX-512) the fused kernel is this library's own, which returns weights from the same
/// pass if no gradient is needed; elsewhere it is LibTorch's. Both paths are twice differentiable in q, k, v and the mask's
/// bias. The gradient of a fused kernel's log-sum-exp is computed by the definition and holds all logits in memory.
///
/// Throws c10::ValueError or c10::TypeError on bad input. Has no state and is safe to call from several threads.
XATTN_API AttentionResult attention(const at::Tensor& q,
                                    const at::Tensor& k,
                                    const at::Tensor& v,
                                    const AttentionOptions& options = {});

/// Exact attention over several parts of the keys, from the results over each part alone, which need a log-sum-exp:
///
///   auto first = attention(q, k1, v1, {.log_sum_exp = true}), second = attention(q, k2, v2, {.log_sum_exp = true});
///   auto all = merge({first, second});                                           // over the keys of both
///
/// Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867. Each part has its own mask and dropout. If every part has
/// the weights of all heads, [B, H, Lq, Lk], those of all keys are returned. Rows without keys, in some parts or all, are
/// zeros as in `attention`. Differentiable to any order. Costs a few passes over the outputs. A log-sum-exp is rounded beside
/// large logits: at 1e6, float32 keeps each part's share to 3 %.
///
/// Throws c10::ValueError if there is no part, if one has no log-sum-exp, if shapes differ, or for weights of another kind.
XATTN_API AttentionResult merge(const std::vector<AttentionResult>& parts);

}  // namespace xattn
