// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/script.h>
#include <torch/types.h>

#include <string>

namespace examples {

/// A TorchScript module in a file, as a frozen encoder: it runs in evaluation mode and without gradients, and its parameters do
/// not belong to the model that uses it. LibTorch RUNS CODE FROM THE FILE: use only files that you trust.
class PretrainedImpl : public torch::nn::Module {
 public:
  /// Throws std::runtime_error, naming the file, unless it is a regular file that can be read and holds a TorchScript module.
  explicit PretrainedImpl(const std::string& path);

  /// The same from `bytes()`, uint8 [N]. name: for messages.
  PretrainedImpl(const torch::Tensor& bytes, std::string name);

  /// Throws std::runtime_error, naming the file, unless the module maps one tensor to one tensor.
  torch::Tensor forward(const torch::Tensor& x);

  /// The file as uint8 [N]; a checkpoint keeps it, so that no second file is needed.
  const torch::Tensor& bytes() const { return bytes_; }

  /// The text that the file holds under this name beside the module; empty if there is none.
  std::string extra_file(const std::string& name) const;

  const std::string& file_name() const { return name_; }

 private:
  torch::Tensor bytes_;
  std::string name_;
  torch::jit::Module module_;
};
TORCH_MODULE(Pretrained);

}  // namespace examples
