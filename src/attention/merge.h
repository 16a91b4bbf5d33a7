// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

// Merging the results over parts of a context by their log-sum-exp: Milakov and Gimelshein, Online normalizer calculation for
// softmax, 2018, https://arxiv.org/abs/1805.02867. The largest logit is stored separately, because beside a logit of -1e9 a
// float32 loses log n of n keys.
namespace xattn::detail::engine {

/// The log-sum-exp of a part is largest + log_sum.
struct LogSumExp {
  float largest = 0;
  float log_sum = -std::numeric_limits<float>::infinity();  ///< -inf for a part without keys
  bool is_empty() const { return log_sum == -std::numeric_limits<float>::infinity(); }
};

/// The log-sum-exp over two parts together.
inline LogSumExp log_sum(const LogSumExp& x, const LogSumExp& y) {
  if (x.is_empty()) return y;
  if (y.is_empty()) return x;
  const auto most = std::max(x.largest, y.largest);
  return {most, std::log(std::exp(x.largest - most + x.log_sum) + std::exp(y.largest - most + y.log_sum))};
}

/// The share of a part's keys in the sum over all keys.
inline float share_of(const LogSumExp& part, const LogSumExp& all) {
  return part.is_empty() ? 0 : std::exp((part.largest - all.largest) + (part.log_sum - all.log_sum));
}

/// The log-sum-exp of consecutive rows, in two arrays as the softmax kernel writes them.
struct LogSumExps {
  float *largest = nullptr, *log_sum = nullptr;

  LogSumExp operator[](int64_t row) const { return {largest[row], log_sum[row]}; }
  void set(int64_t row, const LogSumExp& x) const { largest[row] = x.largest, log_sum[row] = x.log_sum; }
  LogSumExps operator+(int64_t rows) const { return {largest + rows, log_sum + rows}; }
  explicit operator bool() const { return log_sum != nullptr; }
};

inline void scale(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

}  // namespace xattn::detail::engine
