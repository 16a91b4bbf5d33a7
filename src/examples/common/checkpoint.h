// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "trainer.h"

// A checkpoint is a safetensors file: the tensors of the model as "model.NAME", and in its metadata who wrote it ("program")
// and all that it takes to make the model again.
namespace examples {

struct Checkpoint {
  std::string path;
  std::map<std::string, std::string> metadata;
  std::map<std::string, torch::Tensor> tensors;

  /// Throws xattn::FileError if the metadata has no such entry.
  const std::string& text(const std::string& name) const;
  /// Likewise, and if it is no JSON.
  nlohmann::json json(const std::string& name) const;
};

/// Throws xattn::FileError, naming the file, unless `program` wrote it.
Checkpoint read_checkpoint(const std::string& path, const std::string& program);

/// What the training was made with that a checkpoint is of. Throws xattn::FileError.
TrainerOptions training_of(const Checkpoint& checkpoint);

/// A training that can be stopped and taken up again.
struct TrainingRun {
  std::string program;                          ///< as users call it
  std::string output;                           ///< the checkpoint to write at the end
  const char* unit;                             ///< what is counted, see ProgressBar
  std::map<std::string, std::string> metadata;  ///< of the checkpoint; that of the training is added
  std::map<std::string, torch::Tensor> extra;   ///< tensors that go into the file beside the model's own

  /// Where the state of the training is kept until it is done: output + ".training".
  std::string state_path() const { return output + ".training"; }

  /// Trains to the end with a progress bar, writes the checkpoint and removes the state. Saves the state twice a minute, and
  /// when Ctrl-C asks to stop; then throws program::Interrupted, which says how to go on. Of a team only the leader shows and
  /// writes anything.
  void run(Trainer& trainer, const Trainer::Forward& forward) const;
};

}  // namespace examples
