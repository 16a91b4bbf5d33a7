// SPDX-License-Identifier: Apache-2.0
#include "common/trained_model.h"

#include <fmt/format.h>
#include <unistd.h>
#include <xattn/file_error.h>
#include <xattn/load.h>
#include <xattn/safetensors.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <span>
#include <system_error>
#include <utility>

#include "base/printed.h"
#include "common/write_file.h"
#include "files/json.h"
#include "programs/interrupt.h"
#include "programs/program.h"

namespace examples {
namespace {

// One line, without the backtrace of LibTorch's errors.
std::string reason_of(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string what = of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
  return xattn::detail::one_line(what.substr(0, what.find('\n')));
}

std::string bar(const Progress& progress) {
  constexpr int64_t kWidth = 24;
  return fmt::format("[{:.<{}}]", std::string(static_cast<size_t>(kWidth * progress.step / progress.steps), '#'), kWidth);
}

std::string duration(double seconds) {
  const auto whole = std::lround(seconds);
  return whole < 60 ? fmt::format("{} s", whole) : fmt::format("{} min {:02} s", whole / 60, whole % 60);
}

// Shows the progress of a training on standard output: as a bar redrawn in place on a terminal, otherwise as ten plain lines.
class ProgressBar {
 public:
  explicit ProgressBar(std::string unit) : unit_(std::move(unit)) {}
  ~ProgressBar() {
    if (line_is_open_) std::cout << std::endl;
  }
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void show(const Progress& progress) {
    const auto text = fmt::format("step {}/{}  loss {:.3f}  accuracy {:5.1f} %  {:.0f} {}/s  {} left", progress.step,
                                  progress.steps, progress.loss, 100 * progress.accuracy, progress.examples_per_second, unit_,
                                  duration(progress.seconds_left));
    const bool last = progress.step == progress.steps;
    if (terminal_) {
      constexpr auto kClearToEnd = "\x1b[K";
      std::cout << "\r" << bar(progress) << " " << text << kClearToEnd << std::flush;
      line_is_open_ = true;
    } else if (const auto tenth = 10 * progress.step / progress.steps; tenth > last_tenth_ || last) {
      last_tenth_ = tenth;
      std::cout << text << std::endl;
    }
  }

 private:
  std::string unit_;
  bool terminal_ = isatty(STDOUT_FILENO) != 0;
  bool line_is_open_ = false;
  int64_t last_tenth_ = 0;  // of the training that has a line
};

}  // namespace

const std::string& TrainedModel::text(const std::string& name) const {
  const auto found = metadata.find(name);
  if (found == metadata.end()) throw xattn::FileError(fmt::format("{}: has no '{}' in its metadata", path, name));
  return found->second;
}

nlohmann::json TrainedModel::value(const std::string& name,
                                   const std::string& key,
                                   bool (nlohmann::json::*is_kind)() const,
                                   const char* kind) const {
  constexpr size_t kMostBytes = 100'000;
  const auto& entry = text(name);
  xattn::detail::parse_json("metadata", fmt::format("{}: '{}'", path, name), std::as_bytes(std::span(entry)), kMostBytes);
  const auto json = nlohmann::json::parse(entry);  // which has passed all checks
  const auto found = json.find(key);
  if (found == json.end() || !((*found).*is_kind)()) {
    throw xattn::FileError(fmt::format("{}: '{}' in its metadata must have '{}', {}", path, name, key, kind));
  }
  return *found;
}

void naming_file(const std::string& path, const std::function<void()>& make) {
  try {
    make();
  } catch (const std::exception& error) {
    const auto reason = reason_of(error);
    if (reason.find(path) != std::string::npos) throw;
    throw xattn::FileError(fmt::format("{}: {}", path, reason));
  }
}

TrainedModel read_trained_model(const std::string& path, const std::string& program) {
  const auto file = xattn::open_checkpoint(path);
  const auto writer = file.metadata().find("program");
  const auto found = writer == file.metadata().end() ? "of no program" : "of " + xattn::detail::shown(writer->second);
  if (writer == file.metadata().end() || writer->second != program) {
    throw xattn::FileError(
        fmt::format("{}: must be a checkpoint of {}, but is one {}; `{} train` writes one", path, program, found, program));
  }
  TrainedModel model{path, file.metadata(), {}};
  for (const auto& [name, info] : file.tensors()) model.tensors.emplace(name, file.tensor(name));
  return model;
}

std::vector<Curve> load_weights(torch::nn::Module& model, const TrainedModel& file, torch::Device device) {
  std::vector<Curve> curves;
  naming_file(file.path, [&] {
    xattn::load_weights(model, file.tensors, {.prefix = "model."});
    curves = unpack_curves(file.tensors);
  });
  model.to(device);
  model.eval();
  return curves;
}

TrainerOptions training_of(const TrainedModel& file) {
  constexpr auto kTraining = "training";
  const int64_t steps = file.value(kTraining, "steps", &nlohmann::json::is_number_integer, "an integer");
  if (steps < 1 || steps > kMostSteps) {
    throw xattn::FileError(fmt::format("{}: its steps must be from 1 to {}, but are {}", file.path, kMostSteps, steps));
  }
  return {.steps = steps, .seed = file.value(kTraining, "seed", &nlohmann::json::is_number_unsigned, "a non-negative integer")};
}

void TrainingRun::check_outputs(Start start) const {
  check_output(output);
  check_output(state_path());
  std::error_code error;
  if (start == Start::fresh && std::filesystem::exists(state_path(), error)) {
    throw program::UsageError(fmt::format(
        "{} holds a training that was stopped; continue it with --resume, or start again with --restart", state_path()));
  }
}

void TrainingRun::run(Trainer& trainer, const Trainer::Forward& forward) const {
  using Clock = std::chrono::steady_clock;
  auto described = metadata;
  described["training"] = nlohmann::json({{"steps", trainer.options().steps}, {"seed", trainer.options().seed}}).dump();
  const bool leads = trainer.processes().leads();
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
  const auto show = [&](const Progress& progress) {
    if (leads) bar.show(progress);
  };
  if (!trainer.run(forward, show, stop)) {
    save_state();
    throw program::Interrupted(fmt::format("stopped after step {} and saved in {}; {}", trainer.step(), state_path(), go_on),
                               interrupt.asked() ? interrupt.signal() : SIGINT);  // another process may have got the signal
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
      save_state();
    } catch (const xattn::FileError&) {  // an earlier state is still there
      throw xattn::FileError(fmt::format("{}; make room, and {}", error.what(), go_on));
    }
    throw xattn::FileError(fmt::format("{}; the training is done and saved in {}; {}", error.what(), state_path(), go_on));
  }
  std::error_code ignored;
  std::filesystem::remove(state_path(), ignored);
}

}  // namespace examples
