// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <xattn/norm.h>

#include <cstdint>

namespace xattn::detail {

/// A norm as plain data, without its module.
struct NormWeights {
  NormKind kind = NormKind::none;
  int64_t size = 0;  ///< of the normalised axis
  double eps = 0;
  at::Tensor weight, bias;  ///< [size]; undefined where there is none
};

/// The data of a norm, which may be empty.
NormWeights norm_weights(const Norm& norm);

/// x [..., size], normalised over its last axis; x itself for NormKind::none. Sums are made in the weight's type or wider.
at::Tensor normalised(const at::Tensor& x, const NormWeights& norm);

namespace engine {

/// n rows of x -> y, which may be x: each head by itself or the whole row, by the size of the norm. Nothing for NormKind::none,
/// for which x must be y.
void normalise_rows(const NormWeights& norm, const float* x, float* y, int64_t n, int64_t features);

}  // namespace engine

}  // namespace xattn::detail
