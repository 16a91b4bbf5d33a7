// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace xattn::detail {

/// x, a fresh tensor on the CPU, with memory that comes in huge pages as far as the system grants them (Linux, madvise(2) with
/// MADV_HUGEPAGE), where it is of several megabytes: the first touch of a result is then one fault for 2 MB and not for 4 KB, and
/// a product that goes through a large matrix by panels finds the addresses of its rows in the processor's table of them.
at::Tensor in_huge_pages(at::Tensor x);

/// n elements that begin where such a page does, so that two megabytes of them lie in one or two and not in the small ones around:
/// for what lives long, as their end takes up a whole page too.
at::Tensor empty_in_huge_pages(int64_t n, const at::TensorOptions& options);

}  // namespace xattn::detail
