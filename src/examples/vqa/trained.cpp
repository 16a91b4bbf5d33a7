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

examples::Pretrained pretrained(const examples::Checkpoint& checkpoint, const char* name, examples::Code code) {
  const auto bytes = checkpoint.tensors.find(name);
  if (bytes == checkpoint.tensors.end()) return nullptr;
  if (code == examples::Code::refuse) {
    throw xattn::FileError(
        fmt::format("{}: holds a pretrained encoder, {}, which is code that would be run; give --trust-code if "
                    "you trust whoever made the file",
                    checkpoint.path, name));
  }
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

Trained make_again(const examples::Checkpoint& checkpoint, examples::Code code) {
  constexpr auto kModel = "model";
  examples::Grammar grammar(checkpoint.text("grammar"), "the grammar in " + checkpoint.path, question_rules());
  const ModelOptions options = {.vocabulary = examples::Vocabulary(grammar.vocabulary()).size(),
                                .text = checkpoint.value<std::string>(kModel, "text"),
                                .attention = checkpoint.value<bool>(kModel, "attention"),
                                .image_encoder = pretrained(checkpoint, kImageEncoder, code),
                                .text_encoder = pretrained(checkpoint, kTextEncoder, code)};
  Trained trained{nullptr, std::move(grammar), {}};
  examples::naming_file(checkpoint.path, [&] { trained.model = Model(options); });
  return trained;
}

Trained load_trained(const std::string& path, torch::Device device, examples::Code code) {
  const auto checkpoint = examples::read_checkpoint(path, kProgram);
  auto trained = make_again(checkpoint, code);
  examples::naming_file(path, [&] {
    xattn::load_weights(*trained.model, checkpoint.tensors, {.prefix = "model."});
    trained.curves = examples::unpack_curves(checkpoint.tensors);
  });
  trained.model->to(device);
  trained.model->eval();
  return trained;
}

}  // namespace vqa
