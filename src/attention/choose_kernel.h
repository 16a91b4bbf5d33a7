// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <xattn/attention_kernel.h>

#include <cstdint>
#include <string_view>

// Which kernel runs, and why. `attention` follows this choice and `explain` prints it, so the two cannot disagree.
namespace xattn::detail {

/// Everything that the choice depends on: sizes and kinds, never values.
struct KernelRequest {
  bool own_kernels = false;      ///< float32 on the CPU, with AVX2 or AVX-512 and without autocast
  bool on_cpu = true;            ///< true wherever `own_kernels` is
  bool is_empty = false;         ///< B, Lq or Lk is 0
  int64_t Lk = 1;                ///< context length
  bool equal_head_sizes = true;  ///< value heads have the size of key heads
  bool shares_keys = false;      ///< there are fewer key/value heads than heads
  bool drops_weights = false;    ///< dropout is above 0
  bool returns_weights = false;
  bool returns_log_sum_exp = false;
  bool is_differentiated = false;  ///< the result may have to be differentiated
  bool mask_is_learned = false;    ///< the mask's bias requires a gradient
};

struct KernelChoice {
  AttentionKernel kernel;
  std::string_view reason;
};

/// The kernel for attention between projected heads: any but `chain`.
KernelChoice choose_kernel(const KernelRequest& request);

/// Number of keys in one part of a long context, chosen so that the logits of a few rows stay in a core's cache.
inline constexpr int64_t kKeysOfAPart = 2048;

/// This library's kernel for a context of this length.
constexpr AttentionKernel own_kernel(int64_t Lk, bool returns_weights) {
  return Lk > 2 * kKeysOfAPart && !returns_weights ? AttentionKernel::heads_in_parts : AttentionKernel::heads;
}

constexpr bool is_own(AttentionKernel kernel) {
  return kernel == AttentionKernel::heads || kernel == AttentionKernel::heads_in_parts || kernel == AttentionKernel::chain;
}

/// Whether one kernel computes both inner products of the standard orders and the softmax between them.
constexpr bool is_fused(AttentionKernel kernel) {
  return kernel != AttentionKernel::tensor_operations && kernel != AttentionKernel::chain;
}

}  // namespace xattn::detail
