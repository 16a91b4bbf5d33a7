// SPDX-License-Identifier: Apache-2.0
#include "kernels/kernels.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#ifdef XATTN_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#ifdef XATTN_AMX
namespace amx {
extern const int64_t kBlockRows;
void product(const Product& p);
}  // namespace amx

namespace {

// Whether the processor has the unit, and the system lets this process use its registers, 8 KB per thread. arch_prctl fails if
// a thread's sigaltstack is too small for them: https://docs.kernel.org/arch/x86/xstate.html.
bool may_use_matrix_unit() {
  constexpr unsigned kBfloat16 = 1 << 22, kTiles = 1 << 24;  // of cpuid 7, edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBfloat16) && (edx & kTiles) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels& amx_kernels() {
  static const auto kernels = [] {
    auto with_unit = avx512::kKernels;
    with_unit.instruction_set = InstructionSet::amx;
    with_unit.has_matrix_unit = true;
    with_unit.many_block_rows = amx::kBlockRows;
    with_unit.product_of_many_rows = amx::product;
    return with_unit;
  }();
  return kernels;
}

}  // namespace
#endif

std::span<const Kernels* const> all_kernels() {
  static const auto all = [] {
    std::vector<const Kernels*> found;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
#ifdef XATTN_AMX
      if (may_use_matrix_unit()) found.push_back(&amx_kernels());
#endif
      found.push_back(&avx512::kKernels);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kKernels);
#endif
    found.push_back(&plain::kKernels);
    return found;
  }();
  return all;
}

int64_t least_many_rows() {
  constexpr unsigned kRowsOfACore = 24;
  static const int64_t rows = kRowsOfACore * std::max(2u, std::thread::hardware_concurrency());
  return rows;
}

bool has_many_rows(int64_t rows, int64_t columns, int64_t depth) {
  return kernels().has_matrix_unit && columns >= kLeastManyColumns && depth >= kLeastManyDepth && rows >= least_many_rows();
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

namespace {

std::atomic<const Kernels*>& chosen_kernels() {
  static std::atomic<const Kernels*> chosen = all_kernels().front();
  return chosen;
}

}  // namespace

const Kernels& kernels() {
  return *chosen_kernels().load(std::memory_order_relaxed);
}

void use_kernels(const Kernels& chosen) {
  chosen_kernels() = &chosen;
}

}  // namespace xattn::detail
