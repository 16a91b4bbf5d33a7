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

/// Which attention weights to return. They are those before dropout, so their rows sum to one (or to zero without keys).
enum class AttentionWeights {
  none,      ///< an undefined tensor: the fastest, and the only one that need not hold B x H x Lq x Lk numbers in memory
  mean,      ///< the mean over heads, [B, Lq, Lk]
  per_head,  ///< [B, H, Lq, Lk], or of chosen heads
};

/// Which implementation runs. Both give the same result; every test compares them.
enum class AttentionPath {
  automatic,   ///< fused where it can be, otherwise the definition
  definition,  ///< plain tensor operations: the documentation that cannot rot
  fused,  ///< a fused kernel; c10::ValueError says why where there is none for what is asked (dropout, gradients of weights, ...)
};

struct AttentionOptions {
  Mask mask = {};
  std::optional<double> scale = {};                   ///< multiplies the logits; default 1/sqrt(d)
  double dropout = 0;                                 ///< probability of dropping a weight, applied whenever above 0
  AttentionWeights weights = AttentionWeights::none;  ///< what to return beside the output
  std::vector<int64_t> weight_heads = {};             ///< with per_head: of these heads, in this order; of all if empty
  bool log_sum_exp = false;                           ///< whether to return the log-sum-exp
  AttentionPath path = AttentionPath::automatic;
};

struct AttentionResult {
  at::Tensor output;       ///< [B, H, Lq, e]
  at::Tensor weights;      ///< undefined, [B, Lq, Lk] or [B, H, Lq, Lk], as asked; differentiable
  at::Tensor log_sum_exp;  ///< [B, H, Lq], at least float32, -inf for a row without keys; differentiable
};

/// Scaled dot-product attention over heads:
///
///   weights = softmax(scale * q k' + bias, over the keys that the mask allows)      output = dropout(weights) v
///
/// Vaswani et al., Attention Is All You Need, 2017, https://arxiv.org/abs/1706.03762; with G < H key/value heads, H/G query
/// heads share one: Ainslie et al., GQA, 2023, https://arxiv.org/abs/2305.13245.
///
/// q [B, H, Lq, d], k [B, G, Lk, d], v [B, G, Lk, e], one floating point type and one device; any strides; any axis may be 0.
/// Fused kernels are this library's own for float32 on the CPU (with AVX2 or AVX-512), which return weights from the same pass where
/// no gradient is wanted, and LibTorch's elsewhere. Differentiable in q, k, v and the mask's bias, twice on both paths. (Gradients through the
/// log-sum-exp of a fused kernel are those of the definition, and hold all logits.) Throws c10::ValueError or c10::TypeError on bad input.
/// No state; safe to call from several threads.
XATTN_API AttentionResult attention(const at::Tensor& q,
                                    const at::Tensor& k,
                                    const at::Tensor& v,
                                    const AttentionOptions& options = {});

}  // namespace xattn
