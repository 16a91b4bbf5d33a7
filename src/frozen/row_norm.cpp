// SPDX-License-Identifier: Apache-2.0
#include "frozen/row_norm.h"

#include <cmath>

#include "cpu/packed.h"

namespace xattn::detail::engine {

// The sum of f(x[i]), in as many parts as AVX-512 has lanes.
template <class F>
float sum_of(const float* x, int64_t n, const F& f) {
  constexpr int64_t kParts = 16;
  float parts[kParts] = {};
  const auto whole = n / kParts * kParts;
  for (int64_t i = 0; i < whole; i += kParts) {
    for (int64_t j = 0; j < kParts; ++j) parts[j] += f(x[i + j]);
  }
  for (auto i = whole; i < n; ++i) parts[i - whole] += f(x[i]);
  float sum = 0;
  for (const auto part : parts) sum += part;
  return sum;
}

void normalise_rows(const NormWeights& norm, float* rows, int64_t n, int64_t features) {
  if (norm.kind == NormKind::none) return;
  const auto size = norm.size;
  const auto* weight = data(norm.weight);
  const auto* bias = norm.bias.defined() ? data(norm.bias) : nullptr;
  for (auto* x = rows; x < rows + n * features; x += size) {
    float mean = 0;
    if (norm.kind == NormKind::layer) {
      mean = sum_of(x, size, [](float value) { return value; }) / static_cast<float>(size);
    }
    const auto squares = sum_of(x, size, [mean](float value) { return (value - mean) * (value - mean); });
    const auto factor = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(size) + norm.eps));
    for (int64_t i = 0; i < size; ++i) x[i] = (x[i] - mean) * factor * weight[i];
    for (int64_t i = 0; bias && i < size; ++i) x[i] += bias[i];
  }
}

}  // namespace xattn::detail::engine
