// SPDX-License-Identifier: Apache-2.0
// The entry point of libFuzzer. It also checks that memory stays in proportion to the input.
#include <sanitizer/allocator_interface.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include "fuzz/targets.h"

namespace {

constexpr size_t kAllowed = 64 << 10;   // memory that a reader may take for any input
constexpr size_t kAllowedPerByte = 64;  // JSON and pickles take up to 40

const auto* const kTarget =
    std::ranges::find(xattn::test::kFuzzTargets, std::string_view(XATTN_FUZZ_TARGET), &xattn::test::FuzzTarget::name);

size_t live = 0;
size_t peak = 0;

void on_malloc(const volatile void*, size_t size) {
  live += size;
  peak = std::max(peak, live);
}

void on_free(const volatile void* memory) {
  if (memory != nullptr) live -= std::min(live, __sanitizer_get_allocated_size(memory));
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  if (kTarget == xattn::test::kFuzzTargets.end()) {
    std::fputs("no target " XATTN_FUZZ_TARGET " in targets.h\n", stderr);
    std::abort();
  }
  __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
  const size_t before = live;
  peak = live;
  kTarget->run({reinterpret_cast<const std::byte*>(data), size});
  if (peak - before > kAllowed + kAllowedPerByte * size) {
    std::fprintf(stderr, "An input of %zu bytes took %zu bytes of memory.\n", size, peak - before);
    std::abort();
  }
  return 0;
}
