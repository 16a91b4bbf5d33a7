// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/export.h>
#include <xattn/norm_options.h>

namespace xattn {

/// A normalisation over the last axis, equal to torch.nn.RMSNorm or torch.nn.LayerNorm. (LibTorch has no RMSNorm module.)
/// Sums are computed in float32 or wider, and the result has the input's type.
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
