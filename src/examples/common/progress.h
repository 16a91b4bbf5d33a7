// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "common/trainer.h"

namespace examples {

/// Shows training on standard output: on a terminal a bar that is redrawn in place, otherwise ten plain lines.
class ProgressBar {
 public:
  /// `unit` is what the training counts: "questions".
  explicit ProgressBar(const char* unit);
  ~ProgressBar();  ///< ends the bar's line
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void show(const Progress& progress);

 private:
  const char* unit_;
  bool terminal_;
  bool line_is_open_ = false;
  int64_t next_line_ = 0;  // in tenths of the training
};

}  // namespace examples
