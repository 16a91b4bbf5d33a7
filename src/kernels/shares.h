// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Divisions of a number of rows, columns or terms. In the namespace of an instruction set: see vector.h.
namespace xattn::detail::XATTN_KERNELS {
namespace {

inline int64_t divided_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// The i-th of `shares` that are equal but for one, the larger ones first.
inline int64_t nth_share(int64_t n, int64_t shares, int64_t i) {
  return n / shares + (i < n % shares);
}

// The larger of as few parts of n as are at most `most`, and equal but for rounding.
inline int64_t equal_part(int64_t n, int64_t most) {
  return divided_up(n, n > most ? divided_up(n, most) : 1);
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
