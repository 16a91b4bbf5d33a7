// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/cross_attention.h>

#include <cstdint>
#include <tuple>

namespace vqa {

/// Features of a board: a grid of 6x6, so that each cell has 2x2 of its own.
inline constexpr int64_t kFeaturesPerSide = 6;
inline constexpr int64_t kFeatures = kFeaturesPerSide * kFeaturesPerSide;

/// Visual question answering: a question attends to an image, and what it finds there is classified.
///
///   features = CNN(board)                              [B, 36, 64]    the context
///   question = sum of its words' vectors               [B, Q, 32]     the query; the Q questions of a board share its context
///   found    = attention(question, key = features + position, value = features)     [B, Q, 64]
///   scores   = Linear(relu(found))                     [B, Q, 10]
///
/// Only the keys know positions, as in DETR (Carion et al., 2020, https://arxiv.org/abs/2005.12872): where to look depends on
/// the place, what is read there does not.
class ModelImpl : public torch::nn::Cloneable<ModelImpl> {
 public:
  ModelImpl() { reset(); }

  void reset() override;

  /// boards [B, 1, 24, 24], words int64 [B, Q, 5] -> scores of the ten digits [B, Q, 10], attention weights [B, Q, 36].
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& boards, const torch::Tensor& words);

  torch::nn::Sequential image_encoder{nullptr};
  torch::nn::Embedding word_embedding{nullptr};
  torch::Tensor position;  ///< [36, 64], learned
  xattn::CrossAttention cross_attention{nullptr};
  torch::nn::Linear classifier{nullptr};
};
TORCH_MODULE(Model);

/// The share of the attention that falls into the asked cells.
/// attention [B, Q, 36], cells int64 [B, Q] -> [B, Q], from 0 to 1.
torch::Tensor share_in_cell(const torch::Tensor& attention, const torch::Tensor& cells);

}  // namespace vqa
