// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace xattn::detail {

/// Room for keys behind the end of a buffer that several contexts read. Keys are written once, by the context that claims them,
/// so a shorter context never sees a change. Thread-safe.
class Room {
 public:
  Room(int64_t keys, int64_t capacity) : end_(keys), capacity_(capacity) {}

  int64_t capacity() const { return capacity_; }

  /// Reserves keys [from, to) for the caller. False if there is no room for them, or if keys already follow the first `from`.
  bool claim(int64_t from, int64_t to) { return to <= capacity_ && end_.compare_exchange_strong(from, to); }

  /// The capacity of a new buffer for a context of this length that has outgrown its old one: appending n keys one by one copies
  /// fewer than 3 n.
  static int64_t for_growth(int64_t keys) { return keys + std::max<int64_t>(keys / 2, 16); }

 private:
  std::atomic<int64_t> end_;
  const int64_t capacity_;
};

/// While it exists, new tensors are ordinary ones without gradients, even under InferenceMode: later calls may write to them.
struct OrdinaryTensors {
  const c10::InferenceMode no_inference_mode{false};
  const at::NoGradGuard no_grad;
};

}  // namespace xattn::detail
