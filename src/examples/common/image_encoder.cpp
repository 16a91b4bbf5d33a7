// SPDX-License-Identifier: Apache-2.0
#include "common/image_encoder.h"

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/pooling.h>

#include "common/batch_norm.h"

namespace examples {
namespace {

torch::nn::Conv2dOptions convolution(int64_t in, int64_t out, int64_t size) {
  return torch::nn::Conv2dOptions(in, out, size).bias(false);  // the norm after it has a bias
}

}  // namespace

ImageEncoderImpl::ImageEncoderImpl(int64_t features) {
  using torch::nn::Conv2d, torch::nn::MaxPool2d, torch::nn::ReLU, torch::nn::Sequential;
  layers = register_module(
      "layers", Sequential(Conv2d(convolution(1, 32, 3).padding(1)), BatchNorm(32), ReLU(), MaxPool2d(2),   // [B, 32, 12, 12]
                           Conv2d(convolution(32, 64, 3).padding(1)), BatchNorm(64), ReLU(), MaxPool2d(2),  // [B, 64, 6, 6]
                           Conv2d(convolution(64, features, 2).stride(2)), BatchNorm(features), ReLU(),     // [B, C, 3, 3]
                           Conv2d(convolution(features, features, 3).padding(1)), BatchNorm(features), ReLU()));
}

torch::Tensor ImageEncoderImpl::forward(const torch::Tensor& boards) {
  return layers->forward(boards);
}

}  // namespace examples
