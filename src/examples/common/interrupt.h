// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <csignal>

namespace examples {

/// While it lives, the first Ctrl-C (or SIGTERM) only asks the program to stop; the second one stops it. One at a time.
class Interrupt {
 public:
  Interrupt() {
    asked_ = 0;
    for (const auto signal : {SIGINT, SIGTERM}) std::signal(signal, &Interrupt::handle);
  }
  ~Interrupt() {
    for (const auto signal : {SIGINT, SIGTERM}) std::signal(signal, SIG_DFL);
  }
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  bool asked() const { return asked_ != 0; }

 private:
  static void handle(int signal) {
    asked_ = 1;
    std::signal(signal, SIG_DFL);
  }
  static inline volatile std::sig_atomic_t asked_ = 0;
};

}  // namespace examples
