// SPDX-License-Identifier: Apache-2.0
// A library to preload into programs in which hide_avx512.py has replaced each instruction `cpuid` by `int3; nop`. It answers as
// the processor would, but denies AVX-512, AVX-VNNI, AVX10 and AMX.
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdint>

namespace {

template <typename... Bits>
constexpr uint32_t without(Bits... bits) {
  return ~((uint32_t{1} << bits) | ...);
}

void answer_cpuid(int, siginfo_t*, void* state) {
  auto& registers = static_cast<ucontext_t*>(state)->uc_mcontext.gregs;
  const auto leaf = static_cast<uint32_t>(registers[REG_RAX]), subleaf = static_cast<uint32_t>(registers[REG_RCX]);
  uint32_t eax, ebx, ecx, edx;
  __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
  if (leaf == 7 && subleaf == 0) {
    ebx &= without(16, 17, 21, 26, 27, 28, 30, 31);  // AVX-512: F, DQ, IFMA, PF, ER, CD, BW, VL
    ecx &= without(1, 6, 11, 12, 14);                // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    edx &= without(2, 3, 8, 22, 23, 24, 25);         // 4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8
  } else if (leaf == 7 && subleaf == 1) {
    eax &= without(4, 5, 21, 23);     // AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA
    edx &= without(4, 5, 8, 10, 19);  // AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10
  }
  registers[REG_RAX] = eax;
  registers[REG_RBX] = ebx;
  registers[REG_RCX] = ecx;
  registers[REG_RDX] = edx;
}

[[gnu::constructor]] void install() {
  struct sigaction action{};
  action.sa_sigaction = answer_cpuid;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGTRAP, &action, nullptr);
}

}  // namespace
