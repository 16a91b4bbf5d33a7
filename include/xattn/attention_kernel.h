// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/export.h>

#include <string_view>

namespace xattn {

/// The code that computes the logits, their softmax and the weighted values, as a `Plan` names it.
enum class AttentionKernel {
  tensor_operations,             ///< the definition: all logits are stored in memory
  heads,                         ///< this library's: one head after another, so that its logits stay in the cache
  heads_in_parts,                ///< the same for a long context, one part after another; returns no weights
  chain,                         ///< this library's, in a `Frozen` whose orders are not the standard ones: a few rows at a time
  fused_cpu,                     ///< LibTorch's fused kernel for the CPU
  scaled_dot_product_attention,  ///< LibTorch's choice among its kernels, on other devices
};

/// "tensor_operations", "heads" ...
XATTN_API std::string_view name_of(AttentionKernel kernel);

}  // namespace xattn
