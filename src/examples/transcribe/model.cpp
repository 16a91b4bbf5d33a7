// SPDX-License-Identifier: Apache-2.0
#include "transcribe/model.h"

#include <fmt/format.h>
#include <malloc.h>
#include <torch/nn/modules/linear.h>
#include <torch/utils.h>
#include <xattn/block.h>
#include <xattn/checkpoint.h>
#include <xattn/file_error.h>
#include <xattn/load_stacks.h>
#include <xattn/stacks.h>

#include <filesystem>

#include "common/json_file.h"

namespace transcribe {
namespace {

using torch::Tensor;
using xattn::AttentionWeights;
using xattn::Checkpoint;

// A tensor outside of the layers, as transformers or OpenAI names it.
Tensor find(const Checkpoint& file, const std::string& name, const std::string& openai) {
  for (const auto& each : {"model." + name, name, openai}) {
    if (file.contains(each)) return file.tensor(each).to(torch::kFloat32);
  }
  throw xattn::FileError(fmt::format("{}: it must hold a Whisper, with {} or {}, but does not", file.path(), name, openai));
}

// Freezes a block and gives its own weights back to the system, so that few of them are in memory twice.
xattn::FrozenBlock frozen(xattn::CrossAttentionBlockImpl& block, const xattn::FreezeOptions& how) {
  auto frozen = block.freeze(how);
  for (auto& parameter : block.parameters()) parameter.set_data(torch::empty({0}));
  malloc_trim(0);
  return frozen;
}

}  // namespace

Model::Model(const std::string& path, std::optional<torch::ScalarType> storage) {
  const torch::NoGradGuard no_grad;
  const auto file = xattn::open_checkpoint(path);
  folder_ = std::filesystem::absolute(file.path()).parent_path().string();
  const examples::JsonFile config(folder_, "config.json");
  std::string type = "whisper";
  config.get("model_type", type);
  config.check(type == "whisper", fmt::format("model_type must be \"whisper\", but is \"{}\"", type));
  {  // The vocabulary first: it alone is in memory twice while it is packed.
    torch::nn::LinearImpl to_logits(torch::nn::LinearOptions(1, 1).bias(false));
    to_logits.weight = find(file, "decoder.embed_tokens.weight", "decoder.token_embedding.weight");
    if (file.contains("proj_out.weight")) {  // otherwise the same weights read tokens and predict them
      token_embedding_ = to_logits.weight;
      to_logits.weight = file.tensor("proj_out.weight").to(torch::kFloat32);
    }
    to_logits_ = xattn::FrozenLinear(to_logits, storage);
  }

  for (size_t i = 0; i < 2; ++i) {
    const auto conv = fmt::format("encoder.conv{}.", i + 1);
    conv_weights_.at(i) = find(file, conv + "weight", conv + "weight");
    conv_biases_.at(i) = find(file, conv + "bias", conv + "bias");
  }
  encoder_positions_ = find(file, "encoder.embed_positions.weight", "encoder.positional_embedding");

  xattn::StackOptionsFromFile options = {.dtype = torch::kFloat32};
  if (!config || file.contains("decoder.token_embedding.weight")) {  // the same for all models of OpenAI
    options.num_heads = encoder_positions_.size(1) / 64;
    config.get("n_text_head", *options.num_heads);
    options.norm_placement = xattn::NormPlacement::before;
    options.activation = xattn::Activation::gelu;
  }
  const xattn::FreezeOptions how = {.storage = storage};
  {  // In a scope: what is left of a module would keep memory from the system while the next is read.
    const auto encoder = xattn::encoder_from(file, options);
    for (const auto& layer : *encoder->layers) encoder_.push_back(frozen(*layer->as<xattn::CrossAttentionBlockImpl>(), how));
    encoder_norm_ = encoder->norm;
  }

  decoder_positions_ = find(file, "decoder.embed_positions.weight", "decoder.positional_embedding");
  const auto decoder = xattn::decoder_from(file, options);
  for (const auto& each : *decoder->layers) {
    auto* layer = each->as<xattn::DecoderLayerImpl>();
    decoder_.push_back({frozen(*layer->self, how), frozen(*layer->cross, how)});
  }
  decoder_norm_ = decoder->norm;
}

Tensor Model::encode(const Tensor& mel) const {
  auto x = mel.unsqueeze(0);  // [1, bins, frames]
  for (const size_t i : {0, 1}) {
    const auto stride = static_cast<int64_t>(i) + 1;  // the second halves the frames
    x = torch::gelu(torch::conv1d(x, conv_weights_.at(i), conv_biases_.at(i), stride, /*padding=*/1));
  }
  x = x.transpose(1, 2) + encoder_positions_;  // [1, frames / 2, E]
  for (const auto& layer : encoder_) x = std::get<0>(layer.forward(x, x, x, {}, {.weights = AttentionWeights::none}));
  return xattn::Norm(encoder_norm_)->forward(x);
}

Contexts Model::contexts(const Tensor& memory, int64_t expected_queries) const {
  Contexts contexts;
  for (const auto& layer : decoder_) {
    contexts.push_back(layer.cross.context(memory, memory, {}, {.expected_queries = expected_queries}));
  }
  return contexts;
}

// The output of the first `layers` [n, T, E], and the attention of these heads in each of them that has some.
std::pair<Tensor, std::vector<Tensor>> Decoding::run(const Tensor& tokens, size_t layers, const Heads& heads) {
  const auto T = tokens.size(1);
  const auto& own = model_.token_embedding_;
  auto x = own.defined() ? own.index({tokens}) : model_.to_logits_.embedding(tokens);
  x += model_.decoder_positions_.narrow(0, length_, T);
  std::vector<Tensor> attention;
  for (size_t i = 0; i < layers; ++i) {
    const auto& [self, cross] = model_.decoder_[i];
    if (length_ == 0) {
      const auto causal = xattn::Mask::causal(xattn::CausalAlignment::lower_right);
      words_[i] = self.context(x, x, causal, {.capacity = model_.longest()});
    } else {
      words_[i] = words_[i].append(x, x);
    }
    x = std::get<0>(self.attend(x, words_[i], {.weights = AttentionWeights::none}));
    xattn::CallOptions call = {.weights = AttentionWeights::none};
    const auto some = heads.find(i);
    if (some != heads.end()) call = {.weights = AttentionWeights::per_head, .weight_heads = some->second};
    auto [y, weights] = cross.attend(x, sound_[i], call);
    x = std::move(y);
    if (weights.defined()) attention.push_back(weights[0]);
  }
  length_ += T;
  return {x, attention};
}

Tensor Decoding::append(const Tensor& tokens) {
  const auto x = run(tokens, words_.size(), {}).first;
  return model_.to_logits_.forward(xattn::Norm(model_.decoder_norm_)->forward(x));
}

Tensor Decoding::attention(const Tensor& tokens, const Heads& heads) {
  return torch::cat(run(tokens, heads.rbegin()->first + 1, heads).second);
}

void Decoding::select(const Tensor& texts) {
  for (auto& context : words_) context = context.select(texts);
}

}  // namespace transcribe
