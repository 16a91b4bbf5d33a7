// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/script.h>
#include <torch/types.h>

#include <string>

namespace examples {

/// A TorchScript module in a file, as a frozen encoder: it is run in evaluation mode and without gradients, and is no part of
/// the parameters of the model that uses it. LibTorch RUNS CODE FROM THE FILE: use files that you trust.
class PretrainedImpl : public torch::nn::Module {
 public:
  /// Throws std::runtime_error, naming the file, if it is no regular file that can be read, or no TorchScript module.
  explicit PretrainedImpl(const std::string& path);

  /// The same from `bytes()`, uint8 [N]; `name` is for messages.
  PretrainedImpl(const torch::Tensor& bytes, std::string name);

  /// One tensor in, one out. Throws std::runtime_error, naming the file, if the module does something else.
  torch::Tensor forward(const torch::Tensor& x);

  /// The file as uint8 [N]: what a checkpoint keeps, so that it needs no second file.
  const torch::Tensor& bytes() const { return bytes_; }

  /// The text kept in the file beside the module under this name; empty if there is none.
  std::string extra_file(const std::string& name) const;

  const std::string& file_name() const { return name_; }

 private:
  torch::Tensor bytes_;
  std::string name_;
  torch::jit::Module module_;
};
TORCH_MODULE(Pretrained);

}  // namespace examples
