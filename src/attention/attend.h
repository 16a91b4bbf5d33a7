// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/attention.h>

#include "attention/softmax.h"

// The entries to attention for the rest of the library. Shapes are those of `attention`.
namespace xattn::detail {

/// `attention` without its checks. REQUIRES: the caller has checked the arguments, the mask included (`check_mask`).
AttentionResult attend_checked(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options);

/// `attention`, checks included, with a log-sum-exp for merging: relative to `largest`, which is always defined. It is 0 for a row
/// without keys, and wherever the log-sum-exp itself is as exact.
RelativeAttention attention_by_largest(const at::Tensor& q,
                                       const at::Tensor& k,
                                       const at::Tensor& v,
                                       const AttentionOptions& options);

}  // namespace xattn::detail
