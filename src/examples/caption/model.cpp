// SPDX-License-Identifier: Apache-2.0
#include "caption/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "common/board.h"
#include "common/grammar.h"

namespace caption {
namespace {

using examples::Vocabulary;
using xattn::AttentionWeights;
using xattn::CrossAttentionBlockOptions;
using xattn::CrossAttentionOptions;

CrossAttentionBlockOptions block_options(AttentionWeights weights) {
  constexpr auto E = ModelImpl::kFeatures;
  const auto attention = CrossAttentionOptions(E, E, E, E).num_heads(ModelImpl::kHeads).attention_weights(weights);
  return CrossAttentionBlockOptions(attention).norm_placement(xattn::NormPlacement::after);
}

constexpr auto kNever = -std::numeric_limits<double>::infinity();

// Log-probabilities of the next word after each beginning, [B, n, vocabulary]. An ended sentence can only be padded.
torch::Tensor next_words(Model& model,
                         const torch::Tensor& words,
                         const torch::Tensor& ended,
                         const std::vector<ImageContext>& images) {
  const auto scores = std::get<0>(model->predict(words, images)).select(2, -1);  // [B, n, vocabulary]
  const auto padding = torch::full_like(scores, kNever);
  padding.select(2, Vocabulary::kPadding).zero_();
  scores.select(2, Vocabulary::kPadding).fill_(kNever);  // never before the end
  const auto next = scores.log_softmax(-1);
  return torch::where(ended.unsqueeze(2), padding, next);
}

}  // namespace

ModelImpl::ModelImpl(const ModelOptions& options) : options(options) {
  image_encoder = register_module("image_encoder", examples::ImageEncoder(kFeatures));
  place = register_parameter("place", torch::randn({examples::kCells, kFeatures}));
  embedding = register_module(
      "embedding",
      torch::nn::Embedding(torch::nn::EmbeddingOptions(options.vocabulary, kFeatures).padding_idx(Vocabulary::kPadding)));
  position = register_parameter("position", torch::randn({options.longest + 1, kFeatures}));
  const xattn::DecoderLayerOptions layer(block_options(AttentionWeights::none).feed_forward(0),
                                         block_options(AttentionWeights::mean).feed_forward(2 * kFeatures));
  for (int64_t i = 0; i < kLayers; ++i) {
    layers.push_back(register_module(fmt::format("layer{}", i), xattn::DecoderLayer(layer)));
  }
  classifier = register_module("classifier", torch::nn::Linear(kFeatures, options.vocabulary));
  recogniser = register_module("recogniser", torch::nn::Linear(kFeatures, examples::kDigitKinds + 1));
}

void ModelImpl::freeze() {
  frozen_.clear();
  for (auto& layer : layers) frozen_.push_back({layer->self->freeze(), layer->cross->freeze()});
}

torch::Tensor ModelImpl::encode(const torch::Tensor& boards) {
  return examples::to_context(image_encoder->forward(boards));
}

std::vector<ImageContext> ModelImpl::contexts(const torch::Tensor& features) {
  const auto places = features + place;  // [B, 9, 96]
  std::vector<ImageContext> images;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (frozen_.empty()) {
      images.emplace_back(layers[i]->cross->context(places, places));
    } else {
      images.emplace_back(frozen_[i].cross.context(places, places));
    }
  }
  return images;
}

std::tuple<torch::Tensor, torch::Tensor> ModelImpl::predict(const torch::Tensor& words,
                                                            const std::vector<ImageContext>& images) {
  const auto B = words.size(0);
  const auto n = words.size(1);
  const auto T = words.size(2);
  const auto mask = xattn::Mask::causal(xattn::CausalAlignment::upper_left) &
                    xattn::Mask::key_padding(words.flatten(0, 1).ne(Vocabulary::kPadding));
  auto x = embedding->forward(words) + position.narrow(0, 0, T);  // [B, n, T, E]
  torch::Tensor weights;
  const bool frozen = !frozen_.empty();
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto sentences = x.flatten(0, 1);  // [B * n, T, E]
    const auto y = std::get<0>(frozen ? frozen_[i].self.forward(sentences, sentences, sentences, mask)
                                      : layers[i]->self->forward(sentences, sentences, sentences, mask));
    // All sentences about one image are queries of the same batch entry, so that the image is not copied for each.
    const auto queries = y.reshape({B, n * T, -1});
    std::tie(x, weights) = frozen ? frozen_[i].cross.attend(queries, std::get<xattn::FrozenContext>(images.at(i)))
                                  : layers[i]->cross->attend(queries, std::get<xattn::Context>(images.at(i)));
    x = x.view({B, n, T, -1});
  }
  return {classifier->forward(x), weights.view({B, n, T, -1})};
}

torch::Tensor ModelImpl::recognise(const torch::Tensor& features) {
  return recogniser->forward(features);
}

Decoded decode(Model& model, const std::vector<ImageContext>& images, int64_t beams) {
  const torch::NoGradGuard no_grad;
  const auto B = std::visit([](const auto& image) { return image.batch_size(); }, images.at(0));
  const auto device = model->place.device();
  const auto V = model->options.vocabulary;
  auto words = torch::full({B, 1, 1}, Vocabulary::kEnd, torch::TensorOptions(torch::kInt64).device(device));  // [B, n, T]
  auto sums = torch::zeros({B, 1}, torch::TensorOptions(device));                                             // [B, n]
  auto ended = torch::zeros({B, 1}, torch::TensorOptions(torch::kBool).device(device));                       // [B, n]
  for (int64_t i = 0; i <= model->options.longest && !ended.all().item<bool>(); ++i) {
    const auto candidates = (sums.unsqueeze(2) + next_words(model, words, ended, images)).flatten(1);  // [B, n * V]
    const auto kept = std::min(beams, candidates.size(1));
    torch::Tensor best;
    std::tie(sums, best) = candidates.topk(kept, /*dim=*/1);  // [B, n], sorted
    const auto beginning = best.floor_divide(V);
    const auto next = best.remainder(V);
    words = torch::cat({words.gather(1, beginning.unsqueeze(2).expand({-1, -1, words.size(2)})), next.unsqueeze(2)}, /*dim=*/2);
    ended = ended.gather(1, beginning).logical_or(next.eq(Vocabulary::kEnd));
  }
  return {words.select(1, 0).slice(1, 1), sums.select(1, 0)};
}

}  // namespace caption
