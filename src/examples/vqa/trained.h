// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <map>
#include <string>
#include <vector>

#include "common/grammar.h"
#include "common/report.h"
#include "common/trained_model.h"
#include "vqa/model.h"

namespace vqa {

inline constexpr auto kProgram = "vqa";

/// A model with the grammar that it was trained on.
struct Trained {
  Model model = nullptr;
  examples::Grammar grammar;
  std::vector<examples::Curve> curves;
};

/// What a checkpoint of the model must have in its metadata, and which tensors beside the model's own: pretrained encoders.
std::map<std::string, std::string> metadata_of(const Model& model, const examples::Grammar& grammar);
std::map<std::string, torch::Tensor> pretrained_of(const Model& model);

/// The model that a checkpoint describes, with fresh weights. Throws xattn::FileError, naming the file, also for pretrained
/// encoders in it whose code may not be run.
Trained make_again(const examples::Checkpoint& checkpoint, examples::Code code);

/// The model of a checkpoint, on the device and in evaluation mode. Throws likewise.
Trained load_trained(const std::string& path, torch::Device device, examples::Code code = examples::Code::refuse);

}  // namespace vqa
