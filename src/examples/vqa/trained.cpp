// SPDX-License-Identifier: Apache-2.0
#include "vqa/trained.h"

#include <fmt/format.h>
#include <xattn/load.h>

#include <nlohmann/json.hpp>

#include "common/vocabulary.h"
#include "vqa/questions.h"

namespace vqa {
namespace {

constexpr auto kImageEncoder = "pretrained.image_encoder";
constexpr auto kTextEncoder = "pretrained.text_encoder";

examples::Pretrained pretrained(const examples::Checkpoint& checkpoint, const char* name) {
  const auto bytes = checkpoint.tensors.find(name);
  if (bytes == checkpoint.tensors.end()) return nullptr;
  return examples::Pretrained(bytes->second, fmt::format("{} in {}", name, checkpoint.path));
}

}  // namespace

std::map<std::string, std::string> metadata_of(const Model& model, const examples::Grammar& grammar) {
  const nlohmann::json made = {{"text", model->options.text}, {"attention", model->options.attention}};
  return {{"program", kProgram}, {"model", made.dump()}, {"grammar", grammar.text()}};
}

std::map<std::string, torch::Tensor> pretrained_of(const Model& model) {
  std::map<std::string, torch::Tensor> tensors;
  if (const auto& encoder = model->options.image_encoder) tensors.emplace(kImageEncoder, encoder->bytes());
  if (const auto& encoder = model->options.text_encoder) tensors.emplace(kTextEncoder, encoder->bytes());
  return tensors;
}

Trained make_again(const examples::Checkpoint& checkpoint) {
  examples::Grammar grammar(checkpoint.text("grammar"), "the grammar in " + checkpoint.path, question_rules());
  const auto made = checkpoint.json("model");
  const ModelOptions options = {.vocabulary = examples::Vocabulary(grammar.vocabulary()).size(),
                                .text = made.at("text"),
                                .attention = made.at("attention"),
                                .image_encoder = pretrained(checkpoint, kImageEncoder),
                                .text_encoder = pretrained(checkpoint, kTextEncoder)};
  return {Model(options), std::move(grammar), {}};
}

Trained load_trained(const std::string& path, torch::Device device) {
  const auto checkpoint = examples::read_checkpoint(path, kProgram);
  auto trained = make_again(checkpoint);
  xattn::load_weights(*trained.model, checkpoint.tensors, {.prefix = "model."});
  trained.model->to(device);
  trained.model->eval();
  trained.curves = examples::unpack_curves(checkpoint.tensors);
  return trained;
}

}  // namespace vqa
