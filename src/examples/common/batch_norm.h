// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/pimpl.h>

#include "common/processes.h"

namespace examples {

/// torch::nn::BatchNorm2d, that takes its statistics over the batches of a whole team, and so gives what one process with all of the
/// batch would. Parameters and buffers have the same names.
class BatchNormImpl : public torch::nn::BatchNormImplBase<2, BatchNormImpl> {
 public:
  using torch::nn::BatchNormImplBase<2, BatchNormImpl>::BatchNormImplBase;

  /// x [B, C, h, w] -> the same.
  torch::Tensor forward(const torch::Tensor& x);

  Team team;

 protected:
  void _check_input_dim(const torch::Tensor& x) override;
};
TORCH_MODULE(BatchNorm);

/// Makes the norms of a model those of a team.
void set_team(torch::nn::Module& model, const Team& team);

}  // namespace examples
