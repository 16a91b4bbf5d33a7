// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/mask.h>

// The backward pass of this library's kernels for heads.
namespace xattn::detail {

/// The inputs of the backward pass: arguments and results of `attend_on_kernels`, and the gradient of its output.
struct AttentionBackward {
  at::Tensor q;            ///< [B, H, Lq, d]
  at::Tensor k;            ///< [B, G, Lk, d]
  at::Tensor v;            ///< [B, G, Lk, e]
  at::Tensor output;       ///< [B, H, Lq, e]
  at::Tensor log_sum_exp;  ///< relative to `largest`, [B, H, Lq]
  at::Tensor largest;      ///< [B, H, Lq]
  at::Tensor output_grad;  ///< [B, H, Lq, e]
  Mask mask;
  double scale = 1;
  bool wants_q = true;
  bool wants_k = true;
  bool wants_v = true;
};

/// Gradients of q, k and v; undefined where not requested.
struct AttentionGradients {
  at::Tensor q, k, v;
};

AttentionGradients differentiate_on_kernels(const AttentionBackward& call);

}  // namespace xattn::detail
