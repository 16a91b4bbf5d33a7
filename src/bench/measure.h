// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <vector>

namespace bench {

/// Times of one call, in microseconds.
struct Times {
  double median = 0;
  double low = 0;  ///< the quartiles
  double high = 0;
  double p95 = 0;  ///< the 95th percentile
  double least = 0;
  size_t samples = 0;
};

/// Times the calls in turns: each of twenty rounds has a slice of time for every call, so that other load on the machine
/// affects all alike. Short calls are repeated within a sample, which takes at least 200 us. Each call gets `seconds` in all; a
/// call that takes longer gets two samples, or one of ten seconds. REQUIRES: every call has run once. `wait` waits for the end
/// of a call (on a GPU).
std::vector<Times> measure(const std::vector<std::function<void()>>& calls, double seconds, const std::function<void()>& wait);

/// The peak rate of this number of threads in float32, in 1e9 operations a second: independent multiply-adds on registers.
double measure_peak(int threads);

}  // namespace bench
