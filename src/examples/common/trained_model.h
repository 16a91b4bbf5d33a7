// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>

#include <chrono>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/trainer.h"

// A checkpoint is a safetensors file. It holds the tensors of the model as "model.NAME"; its metadata names the program that
// wrote it ("program") and describes the model completely.
namespace examples {

/// The contents of a checkpoint, or of the state of a training.
struct TrainedModel {
  std::string path;
  std::map<std::string, std::string> metadata;
  std::map<std::string, torch::Tensor> tensors;

  /// Throws xattn::FileError if the metadata has no such entry.
  const std::string& text(const std::string& name) const;
  /// The value of `key` in the JSON object that is the metadata's entry `name`. Throws xattn::FileError if there is no such
  /// object or value, or the value is not of this kind: `is_kind` tests it, `kind` is its name in the message.
  nlohmann::json value(const std::string& name,
                       const std::string& key,
                       bool (nlohmann::json::*is_kind)() const,
                       const char* kind) const;
};

/// Runs `make`, which makes something from a file, and turns any error into an xattn::FileError that names the file.
void naming_file(const std::string& path, const std::function<void()>& make);

/// Whether code in a checkpoint may be run: pretrained encoders in TorchScript.
enum class Code { refuse, run };

/// Throws xattn::FileError, naming the file, unless `program` wrote it.
TrainedModel read_trained_model(const std::string& path, const std::string& program);

/// Loads the weights into a model that was made for them, moves it to the device, and sets evaluation mode. Returns the curves
/// of its training. Throws xattn::FileError, naming the file.
std::vector<Curve> load_weights(torch::nn::Module& model, const TrainedModel& file, torch::Device device);

/// The options of the training that made the file. Throws xattn::FileError.
TrainerOptions training_of(const TrainedModel& file);

/// How to treat the state of a training that was stopped.
enum class Start { fresh, resume, restart };

/// A training that can be stopped and continued.
struct TrainingRun {
  std::string program;                               ///< its name on the command line
  std::string output;                                ///< the checkpoint to write at the end
  std::string unit;                                  ///< the unit of progress, see ProgressBar
  std::map<std::string, std::string> metadata = {};  ///< of the checkpoint; the options of the training are added
  std::map<std::string, torch::Tensor> extra = {};   ///< tensors of the checkpoint beside the model's own
  std::string resume_options = {};                   ///< what `train --resume` needs beside --output: " --trust-code"
  std::chrono::milliseconds between_saves = std::chrono::seconds(30);

  /// The file that keeps the state of the training until it is done.
  std::string state_path() const { return output + ".training"; }

  /// Before anything else: throws xattn::FileError if the checkpoint or the state could not be written, and program::UsageError
  /// if a fresh start would overwrite the state of a training that was stopped.
  void check_outputs(Start start) const;

  /// Trains to the end with a progress bar, writes the checkpoint and removes the state. Saves the state twice a minute; on
  /// Ctrl-C saves it and throws program::Interrupted with the command that continues. If the state cannot be saved meanwhile, a
  /// warning goes to standard error; if the checkpoint cannot be written, throws an xattn::FileError that says how to write it
  /// from the state. Of several processes only the first prints or writes anything.
  void run(Trainer& trainer, const Trainer::Forward& forward) const;
};

}  // namespace examples
