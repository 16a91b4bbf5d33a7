// SPDX-License-Identifier: Apache-2.0
#include "common/batch_norm.h"

#include <c10/util/Exception.h>

namespace examples {

void BatchNormImpl::_check_input_dim(const torch::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 4, "[batch_norm] x must have shape [B, C, h, w], but has ", x.sizes(), ".");
}

torch::Tensor BatchNormImpl::forward(const torch::Tensor& x) {
  if (!is_training() || processes.size() == 1) return torch::nn::BatchNormImplBase<2, BatchNormImpl>::forward(x);
  _check_input_dim(x);
  const auto of_channels = [](const torch::Tensor& y) { return y.view({1, -1, 1, 1}); };
  const auto own = x.numel() / x.size(1);
  const auto n = processes.sum(torch::tensor(static_cast<float>(own))).item<double>();
  const auto mean = processes.sum(x.sum({0, 2, 3})) / n;
  const auto centred = x - of_channels(mean);
  const auto variance = processes.sum(centred.square().sum({0, 2, 3})) / n;
  {
    const torch::NoGradGuard no_grad;
    const auto momentum = options.momentum().value_or(0.1);
    running_mean.lerp_(mean, momentum);
    running_var.lerp_(variance * (n / (n - 1)), momentum);
    num_batches_tracked += 1;
  }
  return centred * of_channels((variance + options.eps()).rsqrt() * weight) + of_channels(bias);
}

void set_processes(torch::nn::Module& model, const Processes& processes) {
  for (const auto& module : model.modules()) {
    if (auto* norm = module->as<BatchNormImpl>()) norm->processes = processes;
  }
}

}  // namespace examples
