// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>

#include <cstdint>

namespace examples {

/// A small convolutional network. It halves the picture three times; the last convolution combines neighbouring places.
class ImageEncoderImpl : public torch::nn::Module {
 public:
  explicit ImageEncoderImpl(int64_t features);

  /// boards [B, 1, 24, 24], ink from 0 to 1 -> [B, features, 3, 3].
  torch::Tensor forward(const torch::Tensor& boards);

  torch::nn::Sequential layers{nullptr};
};
TORCH_MODULE(ImageEncoder);

/// The places of a feature map as a context, row by row: [B, C, h, w] -> [B, h * w, C].
inline torch::Tensor to_context(const torch::Tensor& features) {
  return features.flatten(2).transpose(1, 2);
}

}  // namespace examples
