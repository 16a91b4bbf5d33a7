// SPDX-License-Identifier: Apache-2.0
#include "model.h"

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/pooling.h>

#include "board.h"
#include "questions.h"

namespace vqa {
namespace {

constexpr int64_t kWordSize = 32;
constexpr int64_t kFeatureSize = 64;
constexpr int64_t kAnswerSize = 64;

torch::nn::Conv2d conv3x3(int64_t from, int64_t to) {
  return torch::nn::Conv2d(torch::nn::Conv2dOptions(from, to, 3).padding(1).bias(false));  // the norm behind it has a bias
}

// [B, 1, 24, 24] -> [B, 64, 6, 6]. The poolings keep to the borders of the cells, and a feature sees 14x14 pixels: all of its
// cell and a rim of others, but never all of another cell. So what is attended to is what is read.
torch::nn::Sequential make_image_encoder() {
  using namespace torch::nn;
  return Sequential(conv3x3(1, 32), BatchNorm2d(32), ReLU(), MaxPool2d(2),                        // [B, 32, 12, 12]
                    conv3x3(32, 64), BatchNorm2d(64), ReLU(),                                     // [B, 64, 12, 12]
                    conv3x3(64, kFeatureSize), BatchNorm2d(kFeatureSize), ReLU(), MaxPool2d(2));  // [B, 64, 6, 6]
}

// Normalised queries and keys bound the logits. Without that a softmax may settle wholly on a wrong feature early in training,
// where no gradient is left to move it away.
xattn::CrossAttention make_cross_attention() {
  return xattn::CrossAttention(xattn::CrossAttentionOptions(/*dim_query=*/kWordSize,
                                                            /*dim_key=*/kFeatureSize,
                                                            /*dim_value=*/kFeatureSize,
                                                            /*dim_output=*/kAnswerSize)
                                   .qk_norm(xattn::NormKind::rms));
}

}  // namespace

void ModelImpl::reset() {
  image_encoder = register_module("image_encoder", make_image_encoder());
  // The vector of word 0, the padding, is zero and stays zero: it adds nothing to the sum of the words.
  word_embedding = register_module(
      "word_embedding", torch::nn::Embedding(torch::nn::EmbeddingOptions(vocabulary_size(), kWordSize).padding_idx(0)));
  position = register_parameter("position", torch::randn({kFeatures, kFeatureSize}));
  cross_attention = register_module("cross_attention", make_cross_attention());
  classifier = register_module("classifier", torch::nn::Linear(kAnswerSize, kDigitKinds));
}

std::tuple<torch::Tensor, torch::Tensor> ModelImpl::forward(const torch::Tensor& boards, const torch::Tensor& words) {
  const auto grid = image_encoder->forward(boards);                     // [B, 64, 6, 6]
  const auto features = grid.flatten(2).transpose(1, 2);                // [B, 36, 64]
  const auto question = word_embedding->forward(words).sum(/*dim=*/2);  // [B, Q, 5, 32] -> [B, Q, 32]
  const auto [found, attention] = cross_attention->forward(question, /*key=*/features + position, /*value=*/features);
  return {classifier->forward(found.relu()), attention};
}

torch::Tensor share_in_cell(const torch::Tensor& attention, const torch::Tensor& cells) {
  const auto B = attention.size(0);
  const auto Q = attention.size(1);
  constexpr auto n = kCellsPerSide;
  constexpr auto m = kFeaturesPerSide / kCellsPerSide;
  const auto of_cells = attention
                            .reshape({B, Q, n, m, n, m})     // [B, Q, cell row, y, cell column, x]
                            .sum(torch::IntArrayRef{3, 5})   // [B, Q, 3, 3]
                            .flatten(2);                     // [B, Q, 9]
  return of_cells.gather(2, cells.unsqueeze(2)).squeeze(2);  // [B, Q]
}

}  // namespace vqa
