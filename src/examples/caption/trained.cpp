// SPDX-License-Identifier: Apache-2.0
#include "caption/trained.h"

#include <xattn/load.h>

#include <utility>

#include "caption/captions.h"
#include "common/vocabulary.h"

namespace caption {

Trained make_model(examples::Grammar grammar) {
  const ModelOptions options = {.vocabulary = examples::Vocabulary(grammar.vocabulary()).size(),
                                .longest = longest_caption(grammar)};
  return {Model(options), std::move(grammar), {}};
}

std::map<std::string, std::string> metadata_of(const examples::Grammar& grammar) {
  return {{"program", kProgram}, {"grammar", grammar.text()}};
}

Trained make_again(const examples::Checkpoint& checkpoint) {
  return make_model({checkpoint.text("grammar"), "the grammar in " + checkpoint.path, caption_rules()});
}

Trained load_trained(const std::string& path, torch::Device device) {
  const auto checkpoint = examples::read_checkpoint(path, kProgram);
  auto trained = make_again(checkpoint);
  examples::naming_file(path, [&] {
    xattn::load_weights(*trained.model, checkpoint.tensors, {.prefix = "model."});
    trained.curves = examples::unpack_curves(checkpoint.tensors);
  });
  trained.model->to(device);
  trained.model->eval();
  return trained;
}

}  // namespace caption
