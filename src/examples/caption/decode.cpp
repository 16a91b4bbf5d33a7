// SPDX-License-Identifier: Apache-2.0
#include "caption/decode.h"

#include <limits>

#include "common/vocabulary.h"

namespace caption {
namespace {

using examples::Vocabulary;

constexpr auto kNever = -std::numeric_limits<double>::infinity();

// Log-probabilities of the word behind each beginning, [B, n, vocabulary]. Behind an ended one stands padding, for sure.
torch::Tensor next_words(Model& model,
                         const torch::Tensor& words,
                         const torch::Tensor& ended,
                         const std::vector<xattn::Context>& images) {
  const auto scores = std::get<0>(model->tell(words, images)).select(2, -1);  // [B, n, vocabulary]
  const auto padding = torch::full_like(scores, kNever);
  padding.select(2, Vocabulary::kPadding).zero_();
  scores.select(2, Vocabulary::kPadding).fill_(kNever);  // never before the end
  const auto next = scores.log_softmax(-1);
  return torch::where(ended.unsqueeze(2), padding, next);
}

}  // namespace

Decoded decode(Model& model, const std::vector<xattn::Context>& images, int64_t beams) {
  const torch::NoGradGuard no_grad;
  const auto B = images.at(0).batch_size();
  const auto device = images.at(0).key().device();
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
