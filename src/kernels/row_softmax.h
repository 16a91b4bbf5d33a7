// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/kernels.h"
#include "kernels/vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

constexpr float kInfinity = __builtin_inff();

// exp(x) for x <= 0, to 2 units in the last place; 0 for -inf. Results below the smallest normal number may be 0.
//
// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln(2) / 2. Among polynomials 1 + r + ... of this degree, this one has
// the smallest relative error on that range, 3e-9.
inline Vector exp_of_negative(Vector x) {
  constexpr float kRound = 12582912.0f;      // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLog2High = 0.693359375f;  // it has few bits, so that its product with n is exact
  constexpr float kLog2Low = -2.12194440e-4f;
#if defined(__AVX512F__)
  x = _mm512_maskz_max_ps(0xffff, broadcast(-104.0f), x);  // exp of it is 0; a NaN stays NaN
#endif
  const Vector rounded = x * 1.44269504f + kRound;  // its last bits are n
  const Vector n = rounded - kRound;
  const Vector r = x - n * kLog2High - n * kLog2Low;
  Vector p = r * 0.001381456f + 0.008368736f;
  p = p * r + 0.04166839f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, p, n);  // GCC 12 warns about the form without a mask
#else
  const auto power = reinterpret_cast<Vector>((reinterpret_cast<Unsigned>(rounded) << 23) + (127u << 23));
  return x < -87.0f ? Vector{} : p * power;  // below, 2^n is not a normal number; a NaN stays NaN
#endif
}

struct Row {
  float* x;
  const float* bias;
  const bool* keep;
  int64_t visible;  // keys, the first ones
};

inline bool hides_keys(const Softmax& s) {
  return s.visible < s.n;
}

inline int64_t visible_keys(const Softmax& s, int64_t i) {
  if (!hides_keys(s)) return s.n;
  const int64_t visible = s.visible + i * s.visible_step;
  return visible < 0 ? 0 : visible < s.n ? visible : s.n;
}

inline Row row_of(const Softmax& s, int64_t i) {
  return {s.x + i * s.x_stride, s.bias ? s.bias + i * s.bias_stride : nullptr, s.keep ? s.keep + i * s.keep_stride : nullptr,
          visible_keys(s, i)};
}

// y of the keys j to j + count - 1, with -inf for keys that the mask excludes. The other lanes are arbitrary.
template <bool kMasked>
inline Vector logits(const Row& row, float scale, int64_t j, int64_t count = kLanes) {
  Vector y = load_first(row.x + j, count) * scale;
  if constexpr (kMasked) {
    if (row.bias != nullptr) y += load_first(row.bias + j, count);
    if (row.keep != nullptr) y = load_first(row.keep + j, count) ? y : broadcast(-kInfinity);
    if (row.visible < j + count) y = lane_numbers() < static_cast<int32_t>(row.visible - j) ? y : broadcast(-kInfinity);
  }
  return y;
}

// y of the last kLanes keys, with -inf for keys that earlier whole vectors have covered. The end of a row then needs no masked
// store, which would delay the loads of the next row.
template <bool kMasked>
inline Vector logits_at_end(const Row& row, float scale, int64_t n) {
  const auto covered = static_cast<int32_t>((n + kLanes - 1) / kLanes * kLanes - n);
  return lane_numbers() >= covered ? logits<kMasked>(row, scale, n - kLanes) : broadcast(-kInfinity);
}

// The number to subtract from y: the largest y, or 0 in a row that a mask has emptied, where exp(-inf - 0) is then 0. Without a
// mask, logits that are all -inf have overflowed, and give NaN.
template <bool kMasked>
inline Vector shift_of(Vector largest) {
  if constexpr (!kMasked) return largest;
  return largest == -kInfinity ? Vector{} : largest;
}

inline Vector inverse(Vector sum) {
  return sum == 0.0f ? Vector{} : 1.0f / sum;
}

inline void write_log_sum_exp(const Softmax& s, int64_t row, Vector shift, Vector sum) {
  if (!s.log_sum_exp) return;
  s.log_sum_exp[row] = (s.largest ? 0.0f : shift[0]) + __builtin_logf(sum[0]);
  if (s.largest) s.largest[row] = shift[0];
}

// Up to kRows rows of kVectors vectors each. Each step runs over all rows before the next step, because within one row it would
// wait for the previous step; masked stores come last, because they delay later loads. If kWidth is less than kLanes, a vector
// holds several rows of kWidth keys.
constexpr int64_t kRows = 16;
constexpr int kMostVectors = 8;

template <int kVectors, bool kMasked, int kWidth = kLanes>
void softmax_short(const Softmax& s, int64_t first, int64_t rows) {
  constexpr int kLast = kVectors - 1;
  const int64_t last = s.n - kLast * kLanes;  // keys in the last vector
  const Integers is_key = lane_numbers() < static_cast<int32_t>(last);
  Vector y[kRows][kVectors], shifts[kRows], sums[kRows];
  for (int64_t r = 0; r < rows; ++r) {
    const Row row = row_of(s, first + r);
    y[r][kLast] = is_key ? logits<kMasked>(row, s.scale, kLast * kLanes, last) : broadcast(-kInfinity);
    Vector largest = y[r][kLast];
#pragma GCC unroll 8
    for (int v = 0; v < kLast; ++v) {
      y[r][v] = logits<kMasked>(row, s.scale, v * kLanes);
      largest = larger(largest, y[r][v]);
    }
    shifts[r] = shift_of<kMasked>(reduce<kWidth>(largest, larger));
  }
  for (int64_t r = 0; r < rows; ++r) {
    sums[r] = Vector{};
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      y[r][v] = exp_of_negative(y[r][v] - shifts[r]);
      sums[r] += y[r][v];
    }
  }
  for (int64_t r = 0; r < rows; ++r) sums[r] = reduce<kWidth>(sums[r], sum_of);
  for (int64_t r = 0; r < rows; ++r) {
    float* const x = s.x + (first + r) * s.x_stride;
    const Vector factor = inverse(sums[r]);
#pragma GCC unroll 8
    for (int v = 0; v < kLast; ++v) store(x + v * kLanes, y[r][v] * factor);
    store_first(x + kLast * kLanes, y[r][kLast] * factor, last);
    write_log_sum_exp(s, first + r, shifts[r], sums[r]);
  }
}

// A row of at least kLanes keys. The first pass finds the largest y and stores y if there is a bias or a mask; the second
// stores exp(y - largest) and sums it; the third divides. The last vector stays in a register.
template <bool kMasked>
void softmax_long(const Softmax& s, int64_t i) {
  const Row row = row_of(s, i);
  const int64_t n = s.n;
  float scale = s.scale;
  const int64_t end = (n - 1) / kLanes * kLanes;
  const Vector y = logits_at_end<kMasked>(row, scale, n);
  Vector largest = y;
  for (int64_t j = 0; j < end; j += kLanes) {
    const Vector each = logits<kMasked>(row, scale, j);
    if constexpr (kMasked) store(row.x + j, each);
    largest = larger(largest, each);
  }
  const Vector shift = shift_of<kMasked>(reduce(largest, larger));
  if constexpr (kMasked) scale = 1;
  const Vector e_at_end = exp_of_negative(y - shift);
  Vector sums = e_at_end;
  for (int64_t j = 0; j < end; j += kLanes) {
    const Vector e = exp_of_negative(load(row.x + j) * scale - shift);
    store(row.x + j, e);
    sums += e;
  }
  const Vector sum = reduce(sums, sum_of);
  const Vector factor = inverse(sum);
  for (int64_t j = 0; j < end; j += kLanes) store(row.x + j, load(row.x + j) * factor);
  const auto covered = static_cast<int32_t>(kLanes - (n - end));
  store(row.x + n - kLanes, lane_numbers() >= covered ? e_at_end * factor : load(row.x + n - kLanes));
  write_log_sum_exp(s, i, shift, sum);
}

// Consecutive rows of kWidth keys, as many as fill whole vectors; the remaining rows stay in `s`.
template <int kWidth>
void softmax_narrow(Softmax& s) {
  Softmax vectors = s;
  vectors.rows = s.rows * kWidth / kLanes;
  vectors.n = vectors.x_stride = kLanes;
  for (int64_t i = 0; i < vectors.rows; i += kRows) {
    softmax_short<1, false, kWidth>(vectors, i, vectors.rows - i < kRows ? vectors.rows - i : kRows);
  }
  s.x += vectors.rows * kLanes;
  s.rows -= vectors.rows * kLanes / kWidth;
}

template <bool kMasked, int kVectors = 1>
void softmax_rows(const Softmax& s) {
  if constexpr (kVectors > kMostVectors) {
    for (int64_t i = 0; i < s.rows; ++i) softmax_long<kMasked>(s, i);
  } else if (s.n > kVectors * kLanes) {
    softmax_rows<kMasked, kVectors + 1>(s);
  } else {
    for (int64_t i = 0; i < s.rows; i += kRows) softmax_short<kVectors, kMasked>(s, i, s.rows - i < kRows ? s.rows - i : kRows);
  }
}

// Long rows that do not see all keys, one by one: each is computed over the keys that it sees, and followed by zeros.
template <bool kMasked>
void softmax_of_visible_keys(const Softmax& s) {
  for (int64_t i = 0; i < s.rows; ++i) {
    const Row row = row_of(s, i);
    const auto one = row.visible > 0 ? softmax_rows<kMasked> : softmax_rows<true>;
    one({.rows = 1,
         .n = row.visible,
         .x = row.x,
         .scale = s.scale,
         .bias = row.bias,
         .keep = row.keep,
         .log_sum_exp = s.log_sum_exp ? s.log_sum_exp + i : nullptr,
         .largest = s.largest ? s.largest + i : nullptr});
    for (int64_t j = row.visible; j < s.n; ++j) row.x[j] = 0;
  }
}

void softmax(const Softmax& all) {
  Softmax s = all;
  const bool has_mask = s.bias || s.keep, is_masked = has_mask || hides_keys(s) || s.n == 0;
  if (hides_keys(s) && s.n > kMostVectors * kLanes) {
    return has_mask ? softmax_of_visible_keys<true>(s) : softmax_of_visible_keys<false>(s);
  }
  if (!is_masked && !s.log_sum_exp && s.x_stride == s.n) {
    if (s.n == 4 && kLanes > 4) softmax_narrow<4>(s);
    if (s.n == 8 && kLanes > 8) softmax_narrow<8>(s);
  }
  is_masked ? softmax_rows<true>(s) : softmax_rows<false>(s);
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
