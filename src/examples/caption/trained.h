// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <map>
#include <string>
#include <vector>

#include "caption/model.h"
#include "common/grammar.h"
#include "common/report.h"
#include "common/trained_model.h"

namespace caption {

inline constexpr auto kProgram = "caption";

/// A model with the grammar that it was trained on.
struct Trained {
  Model model = nullptr;
  examples::Grammar grammar;
  std::vector<examples::Curve> curves;
};

/// A model with fresh weights for this grammar.
Trained make_model(examples::Grammar grammar);

/// What a checkpoint of the model must have in its metadata.
std::map<std::string, std::string> metadata_of(const examples::Grammar& grammar);

/// The model that a checkpoint describes, with fresh weights.
Trained make_again(const examples::Checkpoint& checkpoint);

/// The model of a checkpoint, on the device and in evaluation mode. Throws xattn::FileError, naming the file.
Trained load_trained(const std::string& path, torch::Device device);

}  // namespace caption
