// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/mask.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

// The softmax of attention in plain tensor operations, for logits that were computed in any order; and the entry points to
// attention for the rest of the library.
namespace xattn::detail {

inline constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

struct SoftmaxResult {
  at::Tensor weights;      ///< [B, H, Lq, Lk], at least float32; zeros in a row without keys; differentiable
  at::Tensor log_sum_exp;  ///< [B, H, Lq], if requested, relative to `largest`; -inf for a row without keys
  at::Tensor largest;      ///< the largest logit, [B, H, Lq], 0 for a row without keys; has no gradient
  at::Tensor empty_rows;   ///< rows without keys, [B|1, H|1, Lq|1, 1]; undefined if the kind of the mask rules them out
};

/// An attention result whose log-sum-exp, if requested, is relative to `largest`. Beside a large logit, float32 loses log n of n
/// keys; parts of a context are therefore merged by relative ones.
struct RelativeAttention {
  AttentionResult result;
  at::Tensor largest;  ///< [B, H, Lq], without gradients; 0 for a row without keys, or where LibTorch's kernels ran
};

/// The result with the log-sum-exp itself.
AttentionResult absolute(RelativeAttention attended);

/// The type of the softmax and of sums over ranks: half types keep too few digits of a logit.
at::ScalarType wide_type(at::ScalarType type);
at::ScalarType wide_type(const at::Tensor& x);

/// The factor of the logits.
inline double scale_of(const AttentionOptions& options, int64_t d) {
  return options.scale.value_or(1 / std::sqrt(static_cast<double>(d)));
}

/// The softmax of rows [..., n], differentiable: by LibTorch's operator, or on the kernels if they take these logits.
using SoftmaxOfRows = at::Tensor (*)(const at::Tensor& logits);
at::Tensor softmax_on_operators(const at::Tensor& logits);
at::Tensor softmax_of_rows(const at::Tensor& logits);

/// products: scaled, [B, H, Lq, Lk], any strides, which the weights keep. type: that of the logits, in which the mask is read;
/// products of half types may be wider.
SoftmaxResult softmax_over_keys(const at::Tensor& products,
                                at::ScalarType type,
                                const Mask& mask,
                                bool log_sum_exp,
                                SoftmaxOfRows softmax = softmax_on_operators);

/// `attention` without its checks. REQUIRES: the caller has checked the arguments, the mask included (`check_mask`).
RelativeAttention attend_unchecked(const at::Tensor& q,
                                   const at::Tensor& k,
                                   const at::Tensor& v,
                                   const AttentionOptions& options);

/// The part of weights [B, H, Lq, Lk] that the options request, in the type of the logits: nothing, the mean over heads, all
/// heads or chosen ones.
at::Tensor requested_weights(const at::Tensor& weights, const AttentionOptions& options, at::ScalarType type);

/// The chosen heads of x [B, H, ...], or all if none is named. Uses no tensor of indices, which would make a CUDA call wait.
at::Tensor chosen_heads(const at::Tensor& x, const std::vector<int64_t>& heads);

/// x with `value` in these rows; x itself if `rows` is undefined.
at::Tensor with_rows_filled(const at::Tensor& x, const at::Tensor& rows, double value);

}  // namespace xattn::detail
