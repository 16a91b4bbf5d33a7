// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>
#include <xattn/mask.h>

#include <cstdint>
#include <limits>
#include <vector>

// The softmax of attention in plain tensor operations, for whatever order the logits came from.
namespace xattn::detail {

inline constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

struct SoftmaxResult {
  at::Tensor weights;      ///< [B, H, Lq, Lk], at least float32; zeros in a row without keys; differentiable
  at::Tensor log_sum_exp;  ///< [B, H, Lq], if asked for; -inf for a row without keys
  at::Tensor
      empty_rows;  ///< the rows without keys, [B|1, H|1, Lq|1, 1]; undefined if the mask's kind shows that there are none
};

/// The type that softmax, and what is added up over ranks, works in: half types keep too few digits of a logit.
at::ScalarType wide_type(at::ScalarType type);
at::ScalarType wide_type(const at::Tensor& x);

/// products [B, H, Lq, Lk], scaled already, in any strides: the weights lie in memory as they do. type: of the logits, in which the
/// mask is read; products of half types may be wider. largest: see `attention_by_largest`.
SoftmaxResult softmax_over_keys(
    const at::Tensor& products, at::ScalarType type, const Mask& mask, bool log_sum_exp, at::Tensor* largest = nullptr);

/// `attention` with a log-sum-exp that is relative to each row's largest logit, for merging: beside a large one, float32 loses log n
/// of n keys. largest becomes [B, H, Lq], 0 for a row without keys or where the log-sum-exp is as exact by itself; no gradient.
AttentionResult attention_by_largest(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options, at::Tensor* largest);

/// What the options ask for of weights [B, H, Lq, Lk]: nothing, the mean over heads, all or chosen heads; in the type of the logits.
at::Tensor wanted_weights(const at::Tensor& weights, const AttentionOptions& options, at::ScalarType type);

/// Some heads of x [B, H, ...], or all if none is named. Without a tensor of indices, for which a call on CUDA would have to wait.
at::Tensor chosen_heads(const at::Tensor& x, const std::vector<int64_t>& heads);

/// x with `value` in these rows, if there are any.
at::Tensor with_rows_filled(const at::Tensor& x, const at::Tensor& rows, double value);

}  // namespace xattn::detail
