// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels.h"
#include "vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

constexpr float kInfinity = __builtin_inff();

// exp(x) for x <= 0, to 1 unit in the last place; 0 where that is below the smallest normal number.
//
// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2, exp(r) by a polynomial.
inline Vector exp_of_negative(Vector x) {
  constexpr float kLowest = -87.0f;
  constexpr float kRound = 12582912.0f;      // 1.5 * 2^23: whoever adds it has rounded to an integer
  constexpr float kLog2High = 0.693359375f;  // of few bits, so that its product with n is exact
  constexpr float kLog2Low = -2.12194440e-4f;
  const Vector rounded = x * 1.44269504f + kRound;  // the low bits are n
  const Vector n = rounded - kRound;
  const Vector r = x - n * kLog2High - n * kLog2Low;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // the coefficients of Cephes (S. Moshier, expf)
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const auto power = reinterpret_cast<Vector>((reinterpret_cast<Unsigned>(rounded) << 23) + (127u << 23));
  return x < kLowest ? Vector{} : p * power;  // a NaN is not below
}

// Vector j of a row, of which `count` lanes belong to it; y = -inf where a key is left out.
struct SoftmaxRow {
  float* x;
  const float* bias;
  const bool* keep;
};

inline Vector masked_logits(const SoftmaxRow& row, float scale, int64_t j, int64_t count) {
  Vector y = load_first(row.x + j, count) * scale;
  if (row.bias) y += load_first(row.bias + j, count);
  const Integers kept = row.keep ? load_first(row.keep + j, count) : lane_numbers() < static_cast<int32_t>(count);
  return kept ? y : broadcast(-kInfinity);
}

// Softmax of up to kLanes rows: what is one number a row lies in the lanes of one vector. The first pass finds the largest y,
// and where there is a bias or a mask leaves y in place of x; the second leaves exp(y - largest) and sums; the third divides.
// Of each row, the vector at its end that is not whole stays in `ends`.
template <bool kMasked>
void softmax_rows(const Softmax& s, int64_t first, int64_t rows) {
  const int64_t whole = s.n / kLanes * kLanes, rest = s.n - whole;
  const Integers in_rest = lane_numbers() < static_cast<int32_t>(rest);
  const Vector minus_infinity = broadcast(-kInfinity);
  float* const x = s.x + first * s.x_stride;

  Vector parts[kLanes] = {}, ends[kLanes];
  for (int64_t r = 0; r < rows; ++r) {
    const SoftmaxRow row{x + r * s.x_stride, s.bias ? s.bias + (first + r) * s.bias_stride : nullptr,
                         s.keep ? s.keep + (first + r) * s.keep_stride : nullptr};
    Vector largest = minus_infinity;
    for (int64_t j = 0; j < whole; j += kLanes) {
      Vector y;
      if constexpr (kMasked) {
        y = masked_logits(row, s.scale, j, kLanes);
        store(row.x + j, y);
      } else {
        y = load(row.x + j) * s.scale;
      }
      largest = larger(largest, y);
    }
    if (rest > 0) {
      if constexpr (kMasked) {
        ends[r] = masked_logits(row, s.scale, whole, rest);
      } else {
        ends[r] = in_rest ? load_first(row.x + whole, rest) * s.scale : minus_infinity;
      }
      largest = larger(largest, ends[r]);
    }
    parts[r] = largest;
  }
  const Vector found = reduce(parts, larger);
  const Vector largest = found == minus_infinity ? Vector{} : found;  // an empty row: exp(-inf - 0) = 0

  const float scale = kMasked ? 1 : s.scale;
  for (int64_t r = 0; r < rows; ++r) {
    float* const row = x + r * s.x_stride;
    const Vector shift = broadcast(largest[r]);
    Vector sum{};
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vector e = exp_of_negative(load(row + j) * scale - shift);
      store(row + j, e);
      sum += e;
    }
    if (rest > 0) {
      ends[r] = exp_of_negative(ends[r] - shift);
      sum += ends[r];
    }
    parts[r] = sum;
  }
  for (int64_t r = rows; r < kLanes; ++r) parts[r] = Vector{};
  const Vector sums = reduce(parts, [](Vector a, Vector b) { return a + b; });
  const Vector factors = sums == 0.0f ? Vector{} : 1.0f / sums;

  for (int64_t r = 0; r < rows; ++r) {
    float* const row = x + r * s.x_stride;
    const Vector factor = broadcast(factors[r]);
    for (int64_t j = 0; j < whole; j += kLanes) store(row + j, load(row + j) * factor);
    if (rest > 0) store_first(row + whole, ends[r] * factor, rest);
    if (s.log_sum_exp) s.log_sum_exp[first + r] = largest[r] + __builtin_logf(sums[r]);
  }
}

void softmax(const Softmax& s) {
  constexpr int64_t kShort = 256;  // of longer rows, kLanes together leave the L1 cache
  const int64_t step = s.n <= kShort ? kLanes : 1;
  for (int64_t first = 0; first < s.rows; first += step) {
    const int64_t rows = s.rows - first < step ? s.rows - first : step;
    s.bias || s.keep ? softmax_rows<true>(s, first, rows) : softmax_rows<false>(s, first, rows);
  }
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
