// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

// Results over parts of a context, merged by their log-sum-exp, which is -inf for a part without keys: Milakov and Gimelshein,
// Online normalizer calculation for softmax, 2018, https://arxiv.org/abs/1805.02867.
namespace xattn::detail::engine {

/// The log-sum-exp of two parts.
inline float log_sum(float x, float y) {
  const auto most = std::max(x, y);
  return most == -std::numeric_limits<float>::infinity() ? most : most + std::log(std::exp(x - most) + std::exp(y - most));
}

/// What the keys of a part have of the sum over all.
inline float share_of(float part, float all) {
  return part == -std::numeric_limits<float>::infinity() ? 0 : std::exp(part - all);
}

inline void scale(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

}  // namespace xattn::detail::engine
