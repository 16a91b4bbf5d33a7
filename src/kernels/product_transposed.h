// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/kernels.h"
#include "kernels/vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

// The columns of c in a tile of kRows rows.
template <int kRows>
constexpr int kTransposedColumns = kTransposedSums / kRows;

// Computes the part of c for kRows rows of a and the first `count` of kTransposedColumns rows of b. In each sum, lane l adds the
// terms l, l + kLanes, ... of k; then the lanes are added, those of kLanes sums at a time.
template <int kRows, class Element>
void compute_transposed_tile(const Product& p, int64_t top, int64_t left, int64_t count) {
  constexpr int kColumns = kTransposedColumns<kRows>;
  constexpr int kGroups = (kTransposedSums + kLanes - 1) / kLanes;
  const float* a[kRows];
  const Element* b[kColumns];
  Vector sums[kGroups][kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) a[r] = p.a.data + (top + r) * p.a.stride;
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; ++j)
    b[j] = static_cast<const Element*>(p.b.data) + (left + (j < count ? j : 0)) * p.b.row_stride;
#pragma GCC unroll 16
  for (int i = 0; i < kGroups * kLanes; ++i) sums[i / kLanes][i % kLanes] = Vector{};

  const auto add_terms = [&](auto load_terms) {
    Vector a_terms[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) a_terms[r] = load_terms(a[r]);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      const Vector b_terms = load_terms(b[j]);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const int i = r * kColumns + j;
        sums[i / kLanes][i % kLanes] += a_terms[r] * b_terms;
      }
    }
  };
  const int64_t whole = p.sizes.k / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    add_terms([i](const auto* from) { return load(from + i); });
  }
  if (whole < p.sizes.k) {
    add_terms([&](const auto* from) { return load_first(from + whole, p.sizes.k - whole); });
  }

  float found[kGroups * kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kGroups; ++i) store(found + i * kLanes, reduce(sums[i], sum_of));
  float* c = p.c.data + top * p.c.stride + left;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r, c += p.c.stride) {
    for (int64_t j = 0; j < count; ++j) {
      const float start = (p.bias ? p.bias[left + j] : 0) + (p.accumulate ? c[j] : 0);
      c[j] = start + found[r * kColumns + j];
    }
  }
}

// Computes columns [left, right) of kRows rows of c.
template <int kRows, class Element>
void compute_transposed_rows(const Product& p, int64_t top, int64_t left, int64_t right) {
  constexpr int64_t kColumns = kTransposedColumns<kRows>;
  for (int64_t j = left; j < right; j += kColumns) {
    compute_transposed_tile<kRows, Element>(p, top, j, right - j < kColumns ? right - j : kColumns);
  }
}

// The rows of b are divided into blocks that stay in the L2 cache (64 to 128 KB) while all rows of a are multiplied by them.
template <class Element>
[[gnu::noinline]] void product_transposed_of(const Product& p) {
  constexpr int64_t kBlock = 1 << 15;  // elements
  const int64_t columns = kTransposedSums * (kBlock / kTransposedSums / (p.sizes.k + 1) + 1);
  for (int64_t left = 0; left < p.sizes.n; left += columns) {
    const int64_t right = p.sizes.n - left < columns ? p.sizes.n : left + columns;
    int64_t i = 0;
    for (; i + 4 <= p.sizes.m; i += 4) compute_transposed_rows<4, Element>(p, i, left, right);
    for (; i + 2 <= p.sizes.m; i += 2) compute_transposed_rows<2, Element>(p, i, left, right);
    for (; i < p.sizes.m; ++i) compute_transposed_rows<1, Element>(p, i, left, right);
  }
}

void product_transposed(const Product& p) {
  p.b.storage == Storage::float32 ? product_transposed_of<float>(p) : product_transposed_of<Bfloat16>(p);
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
