// SPDX-License-Identifier: Apache-2.0
#include "common/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <iostream>
#include <string>

namespace examples {
namespace {

std::string bar(const Progress& progress) {
  constexpr int64_t kWidth = 24;
  return fmt::format("[{:.<{}}]", std::string(static_cast<size_t>(kWidth * progress.step / progress.steps), '#'), kWidth);
}

std::string duration(double seconds) {
  const auto whole = static_cast<int64_t>(seconds + 0.5);
  return whole < 60 ? fmt::format("{} s", whole) : fmt::format("{} min {:02} s", whole / 60, whole % 60);
}

}  // namespace

ProgressBar::ProgressBar(const char* unit) : unit_(unit), terminal_(isatty(STDOUT_FILENO) != 0) {}

ProgressBar::~ProgressBar() {
  if (line_is_open_) std::cout << std::endl;
}

void ProgressBar::show(const Progress& progress) {
  const auto text =
      fmt::format("step {}/{}  loss {:.3f}  accuracy {:5.1f} %  {:.0f} {}/s  {} left", progress.step, progress.steps,
                  progress.loss, 100 * progress.accuracy, progress.examples_per_second, unit_, duration(progress.seconds_left));
  const bool last = progress.step == progress.steps;
  if (terminal_) {
    constexpr auto kClearToEnd = "\x1b[K";
    std::cout << "\r" << bar(progress) << " " << text << kClearToEnd << std::flush;
    line_is_open_ = true;
  } else if (const auto tenth = 10 * progress.step / progress.steps; tenth > next_line_ || last) {
    next_line_ = tenth;
    std::cout << text << std::endl;
  }
}

}  // namespace examples
