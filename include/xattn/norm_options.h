// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/arg.h>
#include <xattn/export.h>

#include <cstdint>

namespace xattn {

enum class NormKind {
  none,   ///< the identity, without parameters
  rms,    ///< x / sqrt(mean(x^2) + eps) * weight. Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467
  layer,  ///< (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. Ba et al., 2016, https://arxiv.org/abs/1607.06450
};

/// Options of `Norm`: `NormOptions(NormKind::rms, 64).eps(1e-5)`.
struct XATTN_API NormOptions {
  NormOptions(NormKind kind, int64_t size) : kind_(kind), size_(size) {}
  TORCH_ARG(NormKind, kind);
  /// Features of the last axis.
  TORCH_ARG(int64_t, size);
  /// Added under the square root. Default: 1e-6.
  TORCH_ARG(double, eps) = 1e-6;
  /// Whether kind layer has a bias. Default: true.
  TORCH_ARG(bool, bias) = true;
};

}  // namespace xattn
