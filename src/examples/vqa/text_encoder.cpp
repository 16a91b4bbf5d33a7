// SPDX-License-Identifier: Apache-2.0
#include "vqa/text_encoder.h"

#include <torch/nn/functional/padding.h>
#include <torch/nn/utils/rnn.h>

#include "common/grammar.h"

namespace vqa {
namespace {

using examples::Vocabulary;

torch::nn::Embedding make_embedding(int64_t vocabulary, int64_t features) {
  return torch::nn::Embedding(torch::nn::EmbeddingOptions(vocabulary, features).padding_idx(Vocabulary::kPadding));
}

// Vaswani et al., 2017, section 3.5: row t is sin(t / 10000^(i/n)), then cos of the same, for i = 0 to n - 1: [T, 2n].
torch::Tensor sinusoids(int64_t T, int64_t features) {
  const auto n = features / 2;
  const auto frequencies = torch::pow(10000, -torch::arange(n, torch::kFloat32) / n);  // [n]
  const auto angles = torch::outer(torch::arange(T, torch::kFloat32), frequencies);    // [T, n]
  return torch::cat({angles.sin(), angles.cos()}, /*dim=*/1);
}

}  // namespace

RnnEncoderImpl::RnnEncoderImpl(int64_t vocabulary, int64_t features) {
  embedding = register_module("embedding", make_embedding(vocabulary, features));
  gru = register_module("gru",
                        torch::nn::GRU(torch::nn::GRUOptions(features, features / 2).batch_first(true).bidirectional(true)));
}

torch::Tensor RnnEncoderImpl::forward(const torch::Tensor& words) {
  namespace rnn = torch::nn::utils::rnn;
  const auto lengths = words.ne(Vocabulary::kPadding).sum(1).cpu();  // [N]
  const auto embedded = embedding->forward(words);                   // [N, T, features]
  const auto packed = rnn::pack_padded_sequence(embedded, lengths, /*batch_first=*/true, /*enforce_sorted=*/false);
  const auto read = std::get<0>(gru->forward_with_packed_input(packed));
  return embedded + std::get<0>(rnn::pad_packed_sequence(read, /*batch_first=*/true, /*padding_value=*/0,
                                                         /*total_length=*/words.size(1)));
}

TransformerEncoderImpl::TransformerEncoderImpl(int64_t vocabulary, int64_t features) {
  embedding = register_module("embedding", make_embedding(vocabulary, features));
  position = register_parameter("position", sinusoids(kLongest, features));
  const auto attention = xattn::CrossAttentionOptions(features, features, features, features).num_heads(4);
  const auto layer =
      xattn::CrossAttentionBlockOptions(attention).norm_placement(xattn::NormPlacement::after).feed_forward(2 * features);
  encoder = register_module("encoder", xattn::Encoder(xattn::EncoderOptions(std::vector(kLayers, layer))));
}

torch::Tensor TransformerEncoderImpl::forward(const torch::Tensor& words) {
  const auto T = words.size(1);
  TORCH_CHECK_VALUE(T <= kLongest, "a question may have up to ", kLongest - 1, " words, but has ", T - 1, ".");
  const auto mask = xattn::Mask::key_padding(words.ne(Vocabulary::kPadding));
  return encoder->forward(embedding->forward(words) + position.narrow(0, 0, T), mask);
}

torch::Tensor CachedEncoderImpl::forward(const torch::Tensor& words) {
  namespace F = torch::nn::functional;
  const auto questions = words.cpu().contiguous();
  const auto T = words.size(1);
  std::vector<torch::Tensor> padded;
  for (int64_t i = 0; i < words.size(0); ++i) {
    const auto length = questions[i].ne(Vocabulary::kPadding).sum().item<int64_t>();
    const auto* first = questions[i].const_data_ptr<int64_t>();
    if (states_.size() >= kMostQuestions) states_.clear();
    auto& states = states_[{first, first + length}];
    if (!states.defined()) states = encoder_->forward(words.narrow(0, i, 1).narrow(1, 0, length))[0];
    padded.push_back(F::pad(states, F::PadFuncOptions({0, 0, 0, T - length})));
  }
  return torch::stack(padded);
}

}  // namespace vqa
