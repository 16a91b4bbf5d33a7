// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/kernels.h"
#include "kernels/vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

// c for kRows rows of a and as many rows of b as make kLanes sums with them. Sum by sum, lane l adds up the terms l, l + kLanes ...
// of k; then the lanes are added. Of b, `count` rows exist.
template <int kRows, class Element>
void compute_transposed_tile(const ProductOf<Element>& p, int64_t top, int64_t left, int64_t count) {
  constexpr int kColumns = kLanes / kRows;
  const float* a[kRows];
  const Element* b[kColumns];
  Vector sums[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) a[r] = p.a + (top + r) * p.a_stride;
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j) b[j] = p.b.data + (left + (j < count ? j : 0)) * p.b.row_stride;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = Vector{};

  const auto add_terms = [&](auto load_terms) {
    Vector a_terms[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) a_terms[r] = load_terms(a[r]);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const Vector b_terms = load_terms(b[j]);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sums[r * kColumns + j] += a_terms[r] * b_terms;
    }
  };
  const int64_t whole = p.k / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    add_terms([i](const auto* from) { return load(from + i); });
  }
  if (whole < p.k) {
    add_terms([&](const auto* from) { return load_first(from + whole, p.k - whole); });
  }

  const Vector found = reduce(sums, sum_of);
  float* c = p.c + top * p.c_stride + left;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r, c += p.c_stride) {
    for (int64_t j = 0; j < count; ++j) {
      const float start = (p.bias ? p.bias[left + j] : 0) + (p.accumulate ? c[j] : 0);
      c[j] = start + found[r * kColumns + j];
    }
  }
}

template <int kRows, class Element>
void compute_transposed_rows(const ProductOf<Element>& p, int64_t top) {
  constexpr int64_t kColumns = kLanes / kRows;
  for (int64_t j = 0; j < p.n; j += kColumns) {
    compute_transposed_tile<kRows>(p, top, j, p.n - j < kColumns ? p.n - j : kColumns);
  }
}

// See Kernels::product_transposed. Rows of b are taken in blocks that the L2 cache keeps until all rows of a have met them.
template <class Element>
void product_transposed(const ProductOf<Element>& p) {
  constexpr int64_t kBlock = 1 << 15;  // elements
  const int64_t columns = kLanes * (kBlock / kLanes / (p.k + 1) + 1);
  for (int64_t left = 0; left < p.n; left += columns) {
    auto part = p;
    part.n = p.n - left < columns ? p.n - left : columns;
    part.b.data += left * p.b.row_stride;
    part.c += left;
    if (p.bias) part.bias += left;
    int64_t i = 0;
    for (; i + 4 <= p.m; i += 4) compute_transposed_rows<4>(part, i);
    for (; i + 2 <= p.m; i += 2) compute_transposed_rows<2>(part, i);
    for (; i < p.m; ++i) compute_transposed_rows<1>(part, i);
  }
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
