// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <xattn/block.h>
#include <xattn/frozen_block.h>
#include <xattn/norm.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/pretrained.h"

namespace vqa {

struct ModelOptions {
  int64_t vocabulary;        ///< Vocabulary::size()
  std::string text = "rnn";  ///< or "transformer"
  bool attention = true;     ///< false: mean pooling, for comparison: every place of the image gets the same weight
  examples::Pretrained image_encoder = nullptr;  ///< used instead of the CNN, not trained
  examples::Pretrained text_encoder = nullptr;   ///< used instead of `text`, not trained
};

/// The answers to some questions, and the attention behind them.
struct Answers {
  torch::Tensor scores;  ///< [B, Q, 13], one for each of kAnswers
  torch::Tensor
      word_weights;  ///< [B, Q, T, Lk]: attention of each word, the mean over heads and blocks; undefined values at padding
  torch::Tensor answer_weights;  ///< [B, Q, Lk]: attention of the answer, the mean of the words' weighted by the read-out
};

/// Visual question answering. The text attends to the image: each word of a question is a query, and the places of the image
/// are the context.
///
///   context   = CNN(board) + position                       [B, 9, 128]
///   question  = text encoder(words)                         [B, Q, T, 64]
///   question  = two cross-attention blocks of the question over the context
///   answer    = classifier(one more block, of one learned query over the words)
///
/// An image is encoded once, whatever the number of questions. No loss depends on the attention weights.
class ModelImpl : public torch::nn::Module {
 public:
  static constexpr int64_t kFeatures = 64;        ///< of a word
  static constexpr int64_t kImageFeatures = 128;  ///< of a place of the image
  static constexpr int64_t kHeads = 4;
  static constexpr int64_t kBlocks = 2;

  /// Throws std::runtime_error, naming the file, if the output of a pretrained encoder has another shape than the model needs.
  explicit ModelImpl(const ModelOptions& options);

  /// Attends with frozen copies of the blocks from now on. For inference alone: they do not follow further training.
  void freeze();

  /// boards [B, 1, 24, 24], words int64 [B, Q, T], padded with 0 at the end.
  Answers forward(const torch::Tensor& boards, const torch::Tensor& words);

  ModelOptions options;
  int64_t rows = 0;  ///< of the grid of the context
  int64_t columns = 0;

  torch::nn::AnyModule image_encoder;
  torch::nn::Linear image_projection{nullptr};  ///< from the width of a pretrained encoder; empty without one
  torch::Tensor position;                       ///< [Lk, 128], learned
  torch::nn::AnyModule text_encoder;
  torch::nn::Linear text_projection{nullptr};
  std::vector<xattn::CrossAttentionBlock> blocks;
  xattn::Norm norm{nullptr};
  torch::Tensor reader;  ///< [1, 64], the learned query
  xattn::CrossAttentionBlock read_out{nullptr};
  torch::nn::Linear classifier{nullptr};

 private:
  void make_image_encoder();
  void make_text_encoder();
  std::vector<xattn::FrozenBlock> frozen_blocks_;  // of `blocks` and `read_out`, after `freeze`
};
TORCH_MODULE(Model);

}  // namespace vqa
