// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/types.h>

#include <chrono>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "common/trainer.h"

// A checkpoint is a safetensors file: the tensors of the model as "model.NAME", and in its metadata who wrote it ("program")
// and all that it takes to make the model again.
namespace examples {

struct Checkpoint {
  std::string path;
  std::map<std::string, std::string> metadata;
  std::map<std::string, torch::Tensor> tensors;

  /// Throws xattn::FileError if the metadata has no such entry.
  const std::string& text(const std::string& name) const;
  /// The value of `key` in the JSON object that the metadata has under this name. Throws xattn::FileError likewise, and if it is
  /// no such object, or the value is no T: std::string, bool, int64_t or uint64_t.
  template <typename T>
  T value(const std::string& name, const std::string& key) const;
};

/// Does what makes something of a file. Whatever that throws becomes an xattn::FileError that names the file.
void naming_file(const std::string& path, const std::function<void()>& make);

/// Whether code that a checkpoint holds, pretrained encoders in TorchScript, may be run.
enum class Code { refuse, run };

/// Throws xattn::FileError, naming the file, unless `program` wrote it.
Checkpoint read_checkpoint(const std::string& path, const std::string& program);

/// What the training was made with that a checkpoint is of. Throws xattn::FileError.
TrainerOptions training_of(const Checkpoint& checkpoint);

/// What to do with the state of a training that was stopped.
enum class Start { fresh, resume, restart };

inline Start start_of(bool resume, bool restart) {
  return resume ? Start::resume : restart ? Start::restart : Start::fresh;
}

/// A training that can be stopped and taken up again.
struct TrainingRun {
  std::string program;                          ///< as users call it
  std::string output;                           ///< the checkpoint to write at the end
  const char* unit;                             ///< what is counted, see ProgressBar
  std::map<std::string, std::string> metadata;  ///< of the checkpoint; that of the training is added
  std::map<std::string, torch::Tensor> extra;   ///< tensors that go into the file beside the model's own
  std::string resume_options = {};              ///< what `train --resume` needs beside --output: " --trust-code"
  std::chrono::milliseconds between_saves = std::chrono::seconds(30);

  /// Where the state of the training is kept until it is done: output + ".training".
  std::string state_path() const { return output + ".training"; }

  /// Before anything else: throws xattn::FileError if the checkpoint or the state could not be written, and program::UsageError
  /// for a fresh start where the state of a training that was stopped would be lost.
  void check_outputs(Start start) const;

  /// Trains to the end with a progress bar, writes the checkpoint and removes the state. Saves the state twice a minute, and
  /// when Ctrl-C asks to stop; then throws program::Interrupted, which says how to go on. A state that cannot be saved meanwhile is
  /// a warning on standard error; a checkpoint that cannot be written is an xattn::FileError, which says how to write it from the
  /// state. Of a team only the leader shows and writes anything.
  void run(Trainer& trainer, const Trainer::Forward& forward) const;
};

}  // namespace examples
