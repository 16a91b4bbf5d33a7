// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Divisions of a number of rows, columns or terms. vector.h explains why each instruction set has its own.
namespace xattn::detail::XATTN_KERNELS {
namespace {

inline int64_t divided_up(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// The size of the i-th of `shares` parts of n, which differ by at most one; the larger ones come first.
inline int64_t nth_share(int64_t n, int64_t shares, int64_t i) {
  return n / shares + (i < n % shares);
}

// The size of parts of n if it is divided into as few equal parts of at most `most` as possible.
inline int64_t equal_part(int64_t n, int64_t most) {
  return divided_up(n, n > most ? divided_up(n, most) : 1);
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
