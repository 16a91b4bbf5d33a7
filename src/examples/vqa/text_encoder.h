// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/rnn.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/stacks.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "common/pretrained.h"

// Three text encoders: words int64 [N, T], padded with 0 at the end -> a vector for each word in its context, [N, T, features].
// The vectors at padding are not meaningful.
namespace vqa {

/// A recurrent network that reads the words forwards and backwards. Cho et al., 2014, https://arxiv.org/abs/1406.1078.
class RnnEncoderImpl : public torch::nn::Module {
 public:
  RnnEncoderImpl(int64_t vocabulary, int64_t features);

  torch::Tensor forward(const torch::Tensor& words);

  torch::nn::Embedding embedding{nullptr};
  torch::nn::GRU gru{nullptr};
};
TORCH_MODULE(RnnEncoder);

/// A Transformer encoder. Vaswani et al., 2017, https://arxiv.org/abs/1706.03762.
class TransformerEncoderImpl : public torch::nn::Module {
 public:
  static constexpr size_t kLayers = 2;
  static constexpr int64_t kLongest = 32;  ///< words: the number of learned positions

  TransformerEncoderImpl(int64_t vocabulary, int64_t features);

  /// Throws c10::ValueError for more than kLongest words.
  torch::Tensor forward(const torch::Tensor& words);

  torch::nn::Embedding embedding{nullptr};
  torch::Tensor position;  ///< [kLongest, features], learned; sinusoids at first
  xattn::Encoder encoder{nullptr};
};
TORCH_MODULE(TransformerEncoder);

/// A pretrained encoder that is run once for each question, alone and without padding, and whose states are kept: a large one
/// would take most of the training otherwise. States do not depend on the batch, so that a resumed training computes the same. Not
/// thread-safe: `forward` fills the cache.
class CachedEncoderImpl : public torch::nn::Module {
 public:
  static constexpr size_t kMostQuestions = 20'000;  ///< the cache is cleared when it is full; the shipped grammar has fewer

  explicit CachedEncoderImpl(examples::Pretrained encoder) : encoder_(std::move(encoder)) {}

  /// The states at padding are zero.
  torch::Tensor forward(const torch::Tensor& words);

 private:
  examples::Pretrained encoder_;
  std::map<std::vector<int64_t>, torch::Tensor> states_;  // by the words of the question: [its length, C]
};
TORCH_MODULE(CachedEncoder);

}  // namespace vqa
