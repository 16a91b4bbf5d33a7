// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/kernels.h"
#include "kernels/vector.h"

namespace xattn::detail::XATTN_KERNELS {
namespace {

// The sum of f(x[i]), in as many parts as a vector has lanes.
template <class F>
inline float sum_over_row(const float* x, int64_t n, const F& f) {
  Vector sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += f(load(x + i));
  if (i < n) sum += lane_numbers() < static_cast<int32_t>(n - i) ? f(load_first(x + i, n - i)) : Vector{};
  return reduce(sum, sum_of)[0];
}

void normalise(const RowNorm& norm) {
  const int64_t n = norm.n;
  const auto count = static_cast<float>(n);
  for (int64_t row = 0; row < norm.rows; ++row) {
    const float* x = norm.x + row * n;
    float* y = norm.y + row * n;
    const float mean = norm.subtracts_mean ? sum_over_row(x, n, [](Vector v) { return v; }) / count : 0.0f;
    const float squares = sum_over_row(x, n, [mean](Vector v) { return (v - mean) * (v - mean); });
    const auto factor = static_cast<float>(1 / __builtin_sqrt(static_cast<double>(squares / count) + norm.eps));
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t left = n - i < kLanes ? n - i : kLanes;
      Vector v = (load_first(x + i, left) - mean) * factor * load_first(norm.weight + i, left);
      if (norm.bias != nullptr) v += load_first(norm.bias + i, left);
      store_first(y + i, v, left);
    }
  }
}

}  // namespace
}  // namespace xattn::detail::XATTN_KERNELS
