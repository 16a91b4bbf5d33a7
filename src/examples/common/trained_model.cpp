// SPDX-License-Identifier: Apache-2.0
#include "common/trained_model.h"

#include <fmt/format.h>
#include <xattn/file_error.h>
#include <xattn/load.h>
#include <xattn/safetensors.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <iostream>
#include <span>
#include <system_error>

#include "base/printed.h"
#include "common/progress.h"
#include "common/write_file.h"
#include "files/json.h"
#include "programs/interrupt.h"
#include "programs/program.h"

namespace examples {

namespace {

template <typename T>
constexpr const char* kKind = "";
template <>
constexpr const char* kKind<std::string> = "a string";
template <>
constexpr const char* kKind<bool> = "true or false";
template <>
constexpr const char* kKind<int64_t> = "an integer";
template <>
constexpr const char* kKind<uint64_t> = "a non-negative integer";

// One line, without the backtrace of LibTorch's errors.
std::string reason_of(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string what = of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
  return xattn::detail::one_line(what.substr(0, what.find('\n')));
}

}  // namespace

const std::string& Checkpoint::text(const std::string& name) const {
  const auto found = metadata.find(name);
  if (found == metadata.end()) throw xattn::FileError(fmt::format("{}: has no '{}' in its metadata", path, name));
  return found->second;
}

template <typename T>
T Checkpoint::value(const std::string& name, const std::string& key) const {
  constexpr size_t kMostBytes = 100'000;
  const auto& entry = text(name);
  const auto json =
      xattn::detail::parse_json("metadata", fmt::format("{}: '{}'", path, name), std::as_bytes(std::span(entry)), kMostBytes);
  const auto found = json.find(key);
  const auto* value = found == json.end() ? nullptr : found->template get_ptr<const T*>();
  if (value == nullptr) {
    throw xattn::FileError(fmt::format("{}: '{}' in its metadata must have '{}', {}", path, name, key, kKind<T>));
  }
  return *value;
}
template std::string Checkpoint::value(const std::string&, const std::string&) const;
template bool Checkpoint::value(const std::string&, const std::string&) const;
template int64_t Checkpoint::value(const std::string&, const std::string&) const;
template uint64_t Checkpoint::value(const std::string&, const std::string&) const;

void naming_file(const std::string& path, const std::function<void()>& make) {
  try {
    make();
  } catch (const std::exception& error) {
    const auto reason = reason_of(error);
    if (reason.find(path) != std::string::npos) throw;
    throw xattn::FileError(fmt::format("{}: {}", path, reason));
  }
}

Checkpoint read_checkpoint(const std::string& path, const std::string& program) {
  const auto file = xattn::open_checkpoint(path);
  const auto writer = file.metadata().find("program");
  const auto found = writer == file.metadata().end() ? "of no program" : "of " + xattn::detail::shown(writer->second);
  if (writer == file.metadata().end() || writer->second != program) {
    throw xattn::FileError(
        fmt::format("{}: must be a checkpoint of {}, but is one {}; `{} train` writes one", path, program, found, program));
  }
  Checkpoint checkpoint{path, file.metadata(), {}};
  for (const auto& [name, info] : file.tensors()) checkpoint.tensors.emplace(name, file.tensor(name));
  return checkpoint;
}

TrainerOptions training_of(const Checkpoint& checkpoint) {
  constexpr auto kTraining = "training";
  const auto steps = checkpoint.value<int64_t>(kTraining, "steps");
  if (steps < 1 || steps > kMostSteps) {
    throw xattn::FileError(fmt::format("{}: its steps must be from 1 to {}, but are {}", checkpoint.path, kMostSteps, steps));
  }
  return {.steps = steps, .seed = checkpoint.value<uint64_t>(kTraining, "seed")};
}

void TrainingRun::check_outputs(Start start) const {
  check_output(output);
  check_output(state_path());
  std::error_code error;
  if (start == Start::fresh && std::filesystem::exists(state_path(), error)) {
    throw program::UsageError(fmt::format(
        "{} holds a training that was stopped; go on with it by --resume, or begin anew by --restart", state_path()));
  }
}

void TrainingRun::run(Trainer& trainer, const Trainer::Forward& forward) const {
  using Clock = std::chrono::steady_clock;
  auto described = metadata;
  described["training"] = nlohmann::json({{"steps", trainer.options().steps}, {"seed", trainer.options().seed}}).dump();
  const bool leads = trainer.team().leads();
  const auto save_state = [&] {
    if (!leads) return;
    auto tensors = trainer.state();
    tensors.insert(extra.begin(), extra.end());
    xattn::save_safetensors(state_path(), tensors, described);
  };

  const auto go_on = fmt::format("go on with: {} train --resume --output {}{}", program, output, resume_options);

  const program::Interrupt interrupt;
  ProgressBar bar(unit);
  auto saved = Clock::now();
  const auto stop = [&] {
    if (Clock::now() - saved > between_saves) {
      try {
        save_state();
      } catch (const xattn::FileError& error) {  // the disk may be full for a while
        std::cerr << fmt::format("{}: warning: the training goes on, but its state is not saved: {}\n", program, error.what());
      }
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
    throw program::Interrupted(fmt::format("stopped after step {} and saved in {}; {}", trainer.step(), state_path(), go_on),
                               interrupt.asked() ? interrupt.signal() : SIGINT);  // in this process, or in another
  }

  if (!leads) return;
  auto tensors = pack(trainer.curves());
  tensors.insert(extra.begin(), extra.end());
  for (const auto& [name, tensor] : trainer.state()) {
    if (name.starts_with("model.")) tensors[name] = tensor;
  }
  try {
    xattn::save_safetensors(output, tensors, described);
  } catch (const xattn::FileError& error) {
    try {
      save_state();  // the last step counts
    } catch (const xattn::FileError&) {
      throw xattn::FileError(
          fmt::format("{}; make room, and {}", error.what(), go_on));  // from the state that was saved before
    }
    throw xattn::FileError(fmt::format("{}; the training is done and saved in {}; {}", error.what(), state_path(), go_on));
  }
  std::error_code ignored;
  std::filesystem::remove(state_path(), ignored);
}

}  // namespace examples
