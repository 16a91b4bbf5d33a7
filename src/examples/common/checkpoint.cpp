// SPDX-License-Identifier: Apache-2.0
#include "checkpoint.h"

#include <fmt/format.h>
#include <xattn/file_error.h>
#include <xattn/load.h>
#include <xattn/safetensors.h>

#include <chrono>
#include <filesystem>

#include "interrupt.h"
#include "program.h"
#include "progress.h"

namespace examples {

const std::string& Checkpoint::text(const std::string& name) const {
  const auto found = metadata.find(name);
  if (found == metadata.end()) throw xattn::FileError(fmt::format("{}: has no '{}' in its metadata", path, name));
  return found->second;
}

nlohmann::json Checkpoint::json(const std::string& name) const {
  try {
    return nlohmann::json::parse(text(name));
  } catch (const nlohmann::json::exception& error) {
    throw xattn::FileError(fmt::format("{}: '{}' in its metadata is no JSON: {}", path, name, error.what()));
  }
}

Checkpoint read_checkpoint(const std::string& path, const std::string& program) {
  const auto file = xattn::open_checkpoint(path);
  const auto writer = file.metadata().find("program");
  const auto found = writer == file.metadata().end() ? "of no program" : "of " + writer->second;
  if (writer == file.metadata().end() || writer->second != program) {
    throw xattn::FileError(
        fmt::format("{}: must be a checkpoint of {}, but is one {}; `{} train` writes one", path, program, found, program));
  }
  return {path, file.metadata(), xattn::load_tensors(path)};
}

TrainerOptions training_of(const Checkpoint& checkpoint) {
  const auto training = checkpoint.json("training");
  return {.steps = training.at("steps"), .seed = training.at("seed")};
}

void TrainingRun::run(Trainer& trainer, const Trainer::Forward& forward) const {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::seconds kBetweenSaves(30);
  auto described = metadata;
  described["training"] = nlohmann::json({{"steps", trainer.options().steps}, {"seed", trainer.options().seed}}).dump();
  const bool leads = trainer.team().leads();
  const auto save_state = [&] {
    if (!leads) return;
    auto tensors = trainer.state();
    tensors.insert(extra.begin(), extra.end());
    xattn::save_safetensors(state_path(), tensors, described);
  };

  const Interrupt interrupt;
  ProgressBar bar(unit);
  auto saved = Clock::now();
  const auto stop = [&] {
    if (Clock::now() - saved > kBetweenSaves) {
      save_state();
      saved = Clock::now();
    }
    return interrupt.asked();
  };
  if (!trainer.run(
          forward,
          [&](const Progress& progress) {
            if (leads) bar.show(progress);
          },
          stop)) {
    save_state();
    throw program::Interrupted(fmt::format("stopped after step {} and saved in {}; go on with: {} train --resume --output {}",
                                           trainer.step(), state_path(), program, output));
  }

  if (!leads) return;
  auto tensors = pack(trainer.curves());
  tensors.insert(extra.begin(), extra.end());
  for (const auto& [name, tensor] : trainer.state()) {
    if (name.starts_with("model.")) tensors[name] = tensor;
  }
  xattn::save_safetensors(output, tensors, described);
  std::filesystem::remove(state_path());
}

}  // namespace examples
