// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cpu/packed.h"
#include "modules/block_weights.h"
#include "modules/norm_weights.h"

// Norms, linear layers and what surrounds attention in a block, in float32 on the CPU, by this library's own kernels.
namespace xattn::detail {

/// Matrices [count, n, k], as torch stores weights, packed as right sides [k, n], one behind the other.
Packed pack_weights(const at::Tensor& weights, at::ScalarType storage);

/// A copy as the kernels read it: contiguous, with no pending negation; undefined tensors stay so.
NormWeights copy_of(NormWeights norm);
/// A copy of a bias likewise, or n zeros.
at::Tensor copy_or_zeros(const at::Tensor& bias, int64_t n);

/// The size of a tensor in memory, in bytes; 0 if it is undefined.
int64_t bytes_of(const at::Tensor& x);

/// A linear layer, packed; its weight is undefined where there is none. Immutable; safe to share between threads.
struct PackedLinear {
  Packed weight;
  at::Tensor bias;  ///< [n]

  int64_t bytes() const { return bytes_of(weight.data) + bytes_of(bias); }
};
PackedLinear pack_linear(const LinearWeights& linear, at::ScalarType storage);

/// x [..., k] -> [..., n]. Computed on all threads.
at::Tensor apply(const PackedLinear& linear, const at::Tensor& x);

/// What a block does after its attention. Immutable; safe to share between threads.
class PackedBlock {
 public:
  PackedBlock(const BlockWeights& weights, at::ScalarType storage);

  /// Turns the output of the attention [..., Eq], in consecutive rows, into that of the block, which `block_output` defines:
  /// some rows at a time through the whole feed-forward network, so that intermediate results stay in the cache.
  void finish(const at::Tensor& query, const at::Tensor& attended) const;

  int64_t bytes() const;

 private:
  int64_t features_, hidden_;
  bool norms_before_;
  Pointwise activation_;
  NormWeights attention_norm_, feed_forward_norm_;
  at::Tensor attention_gate_, feed_forward_gate_;  // [Eq], after tanh; undefined where there is none
  PackedLinear in_, multiplier_, out_;
};

}  // namespace xattn::detail
