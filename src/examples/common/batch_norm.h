// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/pimpl.h>

#include "common/processes.h"

namespace examples {

/// torch::nn::BatchNorm2d with statistics over the parts of the batch that all processes hold together: the result is that of
/// one process with the whole batch. Parameters and buffers have the same names.
class BatchNormImpl : public torch::nn::BatchNormImplBase<2, BatchNormImpl> {
 public:
  using torch::nn::BatchNormImplBase<2, BatchNormImpl>::BatchNormImplBase;

  /// x [B, C, h, w] -> the same.
  torch::Tensor forward(const torch::Tensor& x);

  Processes processes;

 protected:
  void _check_input_dim(const torch::Tensor& x) override;
};
TORCH_MODULE(BatchNorm);

/// Sets the processes of every BatchNorm in the model.
void set_processes(torch::nn::Module& model, const Processes& processes);

}  // namespace examples
