// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <string_view>

namespace xattn {

/// The code that computes the logits, the softmax and the weighted values, as reported in a `Plan`.
enum class AttentionKernel {
  tensor_operations,             ///< the definition: all logits are stored in memory
  heads,                         ///< this library's kernel, one head at a time, so that the logits stay in the cache
  heads_in_parts,                ///< the same for a long context, one part of the keys at a time; returns no weights
  chain,                         ///< this library's kernel in a `Frozen` with non-standard orders, a few rows at a time
  fused_cpu,                     ///< LibTorch's fused kernel for the CPU
  scaled_dot_product_attention,  ///< LibTorch's choice among its kernels, on other devices
};

/// "tensor_operations", "heads" ...
XATTN_API std::string_view name_of(AttentionKernel kernel);

}  // namespace xattn
