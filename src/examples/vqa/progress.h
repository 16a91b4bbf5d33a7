// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>

#include "train.h"

namespace vqa {

/// Shows training on standard output: on a terminal a bar that is redrawn in place, otherwise ten plain lines.
class ProgressBar {
 public:
  explicit ProgressBar(int64_t steps);

  void show(const Progress& progress);

 private:
  int64_t steps_;
  bool terminal_;
  int64_t lines_ = 0;  // plain ones, so far
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

}  // namespace vqa
