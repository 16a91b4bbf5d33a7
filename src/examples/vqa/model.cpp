// SPDX-License-Identifier: Apache-2.0
#include "vqa/model.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <stdexcept>

#include "common/board.h"
#include "common/grammar.h"
#include "common/image_encoder.h"
#include "vqa/questions.h"
#include "vqa/text_encoder.h"

namespace vqa {
namespace {

using xattn::CrossAttentionBlock;
using xattn::CrossAttentionBlockOptions;
using xattn::CrossAttentionOptions;

void check_encoder(bool ok, const examples::Pretrained& encoder, const std::string& expected, const torch::Tensor& found) {
  if (ok) return;
  throw std::runtime_error(fmt::format("{}: must make {}, but makes {}", encoder->file_name(), expected, found.sizes()));
}

// Scale 0 makes all logits zero, and so all weights equal.
CrossAttentionBlock make_block(int64_t context_features, std::optional<double> scale = {}) {
  constexpr auto E = ModelImpl::kFeatures;
  const auto attention =
      CrossAttentionOptions(E, context_features, context_features, E).num_heads(ModelImpl::kHeads).scale(scale);
  return CrossAttentionBlock(CrossAttentionBlockOptions(attention).feed_forward(2 * E));
}

// For each image the places of its words among Q * T; where it has fewer than other images, places of padding follow: [B, L].
torch::Tensor places_of_words(const torch::Tensor& real) {
  const auto longest = real.sum(1).max().item<int64_t>();
  return real.to(torch::kUInt8).argsort(/*stable=*/true, /*dim=*/1, /*descending=*/true).narrow(1, 0, longest);
}

}  // namespace

ModelImpl::ModelImpl(const ModelOptions& options) : options(options) {
  make_image_encoder();
  make_text_encoder();
  for (int64_t i = 0; i < kBlocks; ++i) {
    blocks.push_back(register_module(fmt::format("block{}", i),
                                     make_block(kImageFeatures, options.attention ? std::nullopt : std::optional(0.0))));
  }
  norm = register_module("norm", xattn::Norm(xattn::NormKind::layer, kFeatures));
  reader = register_parameter("reader", torch::randn({1, kFeatures}));
  read_out = register_module("read_out", make_block(kFeatures));
  classifier = register_module("classifier", torch::nn::Linear(kFeatures, kAnswers.size()));
}

void ModelImpl::make_image_encoder() {
  auto encoder = options.image_encoder;
  if (encoder) {
    image_encoder = torch::nn::AnyModule(encoder);
    const auto features = encoder->forward(torch::zeros({1, 1, examples::kBoardSize, examples::kBoardSize}));
    check_encoder(features.dim() == 4 && features.size(0) == 1, encoder, "features [B, C, h, w] of boards [B, 1, 24, 24]",
                  features);
    rows = features.size(2);
    columns = features.size(3);
    image_projection = register_module("image_projection", torch::nn::Linear(features.size(1), kImageFeatures));
  } else {
    image_encoder = torch::nn::AnyModule(examples::ImageEncoder(kImageFeatures));
    register_module("image_encoder", image_encoder.ptr());
    rows = columns = 3;
  }
  position = register_parameter("position", torch::randn({rows * columns, kImageFeatures}));
}

void ModelImpl::make_text_encoder() {
  auto encoder = options.text_encoder;
  if (encoder) {
    text_encoder = torch::nn::AnyModule(CachedEncoder(encoder));
    const auto words = torch::full({1, 3}, examples::Vocabulary::kEnd, torch::kInt64);
    const auto states = encoder->forward(words);
    check_encoder(states.dim() == 3 && states.size(0) == 1 && states.size(1) == 3, encoder, "states [N, T, C] of words [N, T]",
                  states);
    text_projection = register_module("text_projection", torch::nn::Linear(states.size(2), kFeatures));
    return;
  }
  if (options.text == "rnn") {
    text_encoder = torch::nn::AnyModule(RnnEncoder(options.vocabulary, kFeatures));
  } else if (options.text == "transformer") {
    text_encoder = torch::nn::AnyModule(TransformerEncoder(options.vocabulary, kFeatures));
  } else {
    throw std::runtime_error(fmt::format("the text encoder must be rnn or transformer, but is '{}'", options.text));
  }
  register_module("text_encoder", text_encoder.ptr());
}

void ModelImpl::freeze() {
  frozen_blocks_.clear();
  for (auto& block : blocks) frozen_blocks_.push_back(block->freeze());
  frozen_blocks_.push_back(read_out->freeze());
}

Answers ModelImpl::forward(const torch::Tensor& boards, const torch::Tensor& words) {
  const auto B = words.size(0);
  const auto Q = words.size(1);
  const auto T = words.size(2);
  auto context = examples::to_context(image_encoder.forward<torch::Tensor>(boards));  // [B, Lk, 128]
  if (image_projection) context = image_projection->forward(context);
  context = context + position;

  const auto sentences = words.flatten(0, 1);                      // [B * Q, T]
  const auto real = sentences.ne(examples::Vocabulary::kPadding);  // [B * Q, T]
  auto states = text_encoder.forward<torch::Tensor>(sentences);    // [B * Q, T, 64]
  if (text_projection) states = text_projection->forward(states);

  // All words about one image are queries of the same batch entry, so that the image is not copied for each question. Padding
  // is left out.
  const auto places = places_of_words(real.view({B, Q * T})).unsqueeze(-1);  // [B, L, 1]
  auto x = states.view({B, Q * T, kFeatures}).gather(1, places.expand({-1, -1, kFeatures}));
  std::vector<torch::Tensor> seen(kBlocks);  // [B, L, Lk] each
  const bool frozen = !frozen_blocks_.empty();
  for (size_t i = 0; i < seen.size(); ++i) {
    std::tie(x, seen[i]) = frozen ? frozen_blocks_[i].forward(x, context, context) : blocks[i]->forward(x, context, context);
  }
  const auto back = [&](const torch::Tensor& of_words) {  // [B, L, n] -> [B * Q, T, n]
    const auto n = of_words.size(-1);
    return of_words.new_zeros({B, Q * T, n}).scatter(1, places.expand({-1, -1, n}), of_words).view({B * Q, T, n});
  };
  x = back(norm->forward(x));
  const auto weights = back(torch::stack(seen).mean(0));  // [B * Q, T, Lk]

  const auto readers = reader.expand({B * Q, 1, kFeatures});
  const auto mask = xattn::Mask::key_padding(real);
  const auto [answer, share] = frozen ? frozen_blocks_.back().forward(readers, x, x, mask)
                                      : read_out->forward(readers, x, x, mask);  // [B*Q, 1, 64], [B*Q, 1, T]
  return {classifier->forward(answer).view({B, Q, -1}), weights.view({B, Q, T, -1}), share.matmul(weights).view({B, Q, -1})};
}

}  // namespace vqa
