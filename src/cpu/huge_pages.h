// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace xattn::detail {

/// Returns x, a new tensor on the CPU, after advising the system to back its memory with huge pages (Linux, madvise(2) with
/// MADV_HUGEPAGE). This pays off from several megabytes on: writing a result then takes a page fault per 2 MB instead of 4 KB,
/// and a product that reads a large matrix by panels has fewer TLB misses.
at::Tensor in_huge_pages(at::Tensor x);

/// A tensor of n elements that starts at a huge page, so that even a few megabytes lie in huge pages. For long-lived tensors,
/// because the last page is also allocated as a whole.
at::Tensor empty_in_huge_pages(int64_t n, const at::TensorOptions& options);

}  // namespace xattn::detail
