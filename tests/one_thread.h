// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Parallel.h>

namespace xattn::test {

/// Uses so many threads while it exists.
class Threads {
 public:
  explicit Threads(int count) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_ = at::get_num_threads();
};

/// One thread: for equal bits, and because LibTorch's operators are slow with several on a busy machine.
struct OneThread : Threads {
  OneThread() : Threads(1) {}
};

}  // namespace xattn::test
