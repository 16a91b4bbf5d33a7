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

/// The feed-forward network of a block; empty where there is none. Immutable; safe to share between threads.
struct PackedFeedForward {
  PackedLinear in, multiplier, out;

  int64_t bytes() const { return in.bytes() + multiplier.bytes() + out.bytes(); }
};

/// Turns the output of the attention [..., Eq], in consecutive rows, into that of the block, which `block_output` defines:
/// some rows at a time through the whole feed-forward network, so that intermediate results stay in the cache. Norms are as the
/// kernels read them, and gates as `open_gate` returns them.
void finish_block(const BlockWeights& weights,
                  const PackedFeedForward& packed,
                  const at::Tensor& query,
                  const at::Tensor& attended);

}  // namespace xattn::detail
