// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <vector>

namespace xattn::detail {

namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace plain {
extern const Kernels kKernels;
}

std::span<const Kernels* const> all_kernels() {
  static const auto all = [] {
    std::vector<const Kernels*> found;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      found.push_back(&avx512::kKernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kKernels);
#endif
    found.push_back(&plain::kKernels);
    return found;
  }();
  return all;
}

float* thread_memory(int64_t floats) {
  struct alignas(64) Line {
    float numbers[16];
  };
  static thread_local std::vector<Line> memory;
  const auto lines = static_cast<size_t>(floats + 15) / 16;
  if (memory.size() < lines) memory.resize(lines);
  return memory.data()->numbers;
}

const Kernels& kernels() {
  return *all_kernels().front();
}

}  // namespace xattn::detail
