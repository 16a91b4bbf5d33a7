// SPDX-License-Identifier: Apache-2.0
#include "attention/choose_kernel.h"

#include <torch/version.h>

namespace xattn {

std::string_view name_of(AttentionKernel kernel) {
  constexpr std::string_view kNames[] = {"tensor_operations",           "heads", "heads_in_parts", "chain", "fused_cpu",
                                         "scaled_dot_product_attention"};
  return kNames[static_cast<size_t>(kernel)];
}

namespace detail {

KernelChoice choose_kernel(const KernelRequest& r) {
  using enum AttentionKernel;
  if (r.drops_weights) return {tensor_operations, "dropout is above 0"};
  if (r.is_empty) return {tensor_operations, "an axis is empty"};
  const auto own = own_kernel(r.Lk, r.returns_weights);
  if (r.own_kernels && !r.is_differentiated) return {own, "the type is float32, and no gradient is required"};
  if (r.returns_weights) {
    return {tensor_operations, r.own_kernels ? "weights and gradients are requested" : "attention weights are requested"};
  }
  if (r.mask_is_learned) return {tensor_operations, "the mask's bias requires a gradient"};
  if (r.own_kernels) return {own, "the type is float32, also of the gradients"};
  if (!r.on_cpu) {
    if (r.returns_log_sum_exp) return {tensor_operations, "only the CPU kernel returns its log-sum-exp"};
    return {scaled_dot_product_attention, "the layer is not on the CPU"};
  }
  if (!r.equal_head_sizes) return {tensor_operations, "LibTorch's CPU kernel needs value heads of the size of key heads"};
  // LibTorch 2.7's takes no fewer key/value heads than heads: it reads beyond them. 2.12's does, those between are untested.
  constexpr bool kTakesFewerHeads = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 12;
  if (r.shares_keys && !kTakesFewerHeads) return {tensor_operations, "heads share keys, and LibTorch is older than 2.12"};
  return {fused_cpu, "this library's is for float32, AVX2 or AVX-512, and no autocast"};
}

}  // namespace detail

}  // namespace xattn
