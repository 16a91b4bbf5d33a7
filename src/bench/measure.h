// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <vector>

namespace bench {

/// Times of one call, in microseconds.
struct Times {
  double median = 0;
  double low = 0, high = 0;  ///< the quartiles
  double least = 0;
  size_t samples = 0;
};

/// Times all calls by turns: in each of some twenty rounds each call has its slice of time, so that whatever else the machine does
/// meets all alike. Calls that are short are repeated within a sample, which takes 200 us or more. Each call gets `seconds` in all,
/// one that takes longer two samples, or one sample of ten seconds. Every call has been called before. `wait` ends what a call has
/// begun (on a GPU).
std::vector<Times> measure(const std::vector<std::function<void()>>& calls, double seconds, const std::function<void()>& wait);

/// The most float32 operations that so many threads do in a second: independent multiply-adds on registers, in 1e9 / s.
double measure_peak(int threads);

}  // namespace bench
