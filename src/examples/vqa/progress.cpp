// SPDX-License-Identifier: Apache-2.0
#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <iostream>
#include <string>

namespace vqa {
namespace {

std::string bar(int64_t step, int64_t steps) {
  constexpr int kWidth = 30;
  return fmt::format("[{:.<{}}]", std::string(kWidth * step / steps, '#'), kWidth);
}

}  // namespace

ProgressBar::ProgressBar(int64_t steps) : steps_(steps), terminal_(isatty(STDOUT_FILENO) != 0) {}

void ProgressBar::show(const Progress& progress) {
  constexpr int64_t kLines = 10;
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin_;
  const auto left = passed.count() / static_cast<double>(progress.step) * static_cast<double>(steps_ - progress.step);
  const auto text = fmt::format("step {}/{}  loss {:.3f}  accuracy {:5.1f} %  {:.0f} s left", progress.step, steps_,
                                progress.loss, 100 * progress.accuracy, left);
  if (terminal_) {
    constexpr auto kClearToEnd = "\x1b[K";
    std::cout << "\r" << bar(progress.step, steps_) << " " << text << kClearToEnd;
    std::cout << (progress.step == steps_ ? "\n" : "") << std::flush;
  } else if (progress.step * kLines >= (lines_ + 1) * steps_) {
    ++lines_;
    std::cout << text << std::endl;
  }
}

}  // namespace vqa
