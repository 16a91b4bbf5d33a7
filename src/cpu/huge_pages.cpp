// SPDX-License-Identifier: Apache-2.0
#include "cpu/huge_pages.h"

#include <ATen/ops/empty.h>

#include <cstdint>

#include "cpu/tuning.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace xattn::detail {

at::Tensor in_huge_pages(at::Tensor x) {
#if defined(MADV_HUGEPAGE)
  auto* const memory = static_cast<char*>(x.mutable_data_ptr());
  const auto begin = reinterpret_cast<uintptr_t>(memory), end = begin + x.nbytes();
  const auto first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  // If this fails, pages stay as they are, which is correct and only slower.
  if (first < last) madvise(memory + (first - begin), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

at::Tensor empty_in_huge_pages(int64_t n, const at::TensorOptions& options) {
  const auto size = static_cast<int64_t>(options.dtype().itemsize()), page = kHugePage / size;
  const auto whole = in_huge_pages(at::empty({(n + page - 1) / page * page + page}, options));
  const auto behind = static_cast<int64_t>(reinterpret_cast<uintptr_t>(whole.const_data_ptr()) % kHugePage) / size;
  return whole.narrow(0, (page - behind) % page, n);
}

}  // namespace xattn::detail
