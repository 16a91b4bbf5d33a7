// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/export.h>

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
  /// Added under the root. Default: 1e-6.
  TORCH_ARG(double, eps) = 1e-6;
  /// Whether kind layer has a bias. Default: true.
  TORCH_ARG(bool, bias) = true;
};

/// A normalisation over the last axis, equal to torch.nn.RMSNorm or torch.nn.LayerNorm. (LibTorch has no RMSNorm module.)
/// Sums are made in float32 or wider, and the result has the input's type.
class XATTN_API NormImpl : public torch::nn::Cloneable<NormImpl> {
 public:
  NormImpl(NormKind kind, int64_t size) : NormImpl(NormOptions(kind, size)) {}
  explicit NormImpl(const NormOptions& options_);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  /// x [..., size] -> [..., size].
  torch::Tensor forward(const torch::Tensor& x);

  NormOptions options;
  torch::Tensor weight;  ///< [size]; undefined for NormKind::none
  torch::Tensor bias;    ///< [size]; undefined unless NormKind::layer with bias
};
TORCH_MODULE(Norm);

}  // namespace xattn
