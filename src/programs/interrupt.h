// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <csignal>
#include <cstddef>

#include "programs/program.h"

namespace program {

/// While it exists, the first Ctrl-C, SIGTERM or SIGHUP only requests a stop; the second one ends the program. An ignored
/// SIGHUP, as under nohup, stays ignored. REQUIRES: no other Interrupt exists.
class Interrupt {
 public:
  Interrupt() {
    signal_ = 0;
    for (size_t i = 0; i < kSignals.size(); ++i) {
      sigaction(kSignals[i], nullptr, &before_[i]);
      struct sigaction ours = {};
      ours.sa_handler = &Interrupt::handle;
      ours.sa_flags = SA_RESTART;
      const bool kept = kSignals[i] == SIGHUP && before_[i].sa_handler == SIG_IGN;
      if (!kept) sigaction(kSignals[i], &ours, nullptr);
    }
  }
  ~Interrupt() {
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  bool asked() const { return signal_ != 0; }
  int signal() const { return signal_; }  ///< the signal that requested the stop

  /// Throws Interrupted with this message if a signal requested a stop.
  void check(const std::string& message) const {
    if (asked()) throw Interrupted(message, signal());
  }

 private:
  static void handle(int signal) {
    signal_ = signal;
    std::signal(signal, SIG_DFL);
  }
  static constexpr std::array kSignals = {SIGINT, SIGTERM, SIGHUP};
  static inline volatile std::sig_atomic_t signal_ = 0;
  std::array<struct sigaction, kSignals.size()> before_ = {};
};

}  // namespace program
