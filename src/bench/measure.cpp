// SPDX-License-Identifier: Apache-2.0
#include "bench/measure.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <thread>

namespace bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double quantile(const std::vector<double>& sorted, double q) {
  const auto place = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const auto above = std::min(below + 1, sorted.size() - 1);
  return std::lerp(sorted[below], sorted[above], place - static_cast<double>(below));
}

}  // namespace

std::vector<Times> measure(const std::vector<std::function<void()>>& calls, double seconds, const std::function<void()>& wait) {
  constexpr double kShortest = 200e-6;
  constexpr double kLongest = 10;
  constexpr int kRounds = 20;
  struct Sampling {
    int repeats = 1;
    double spent = 0;
    std::vector<double> samples;
  };
  std::vector<Sampling> states(calls.size());
  const auto sample = [&](size_t i) {
    const auto begin = Clock::now();
    for (int r = 0; r < states[i].repeats; ++r) calls[i]();
    wait();
    return seconds_since(begin);
  };
  const auto keep = [&](size_t i, double time) {
    states[i].spent += time;
    states[i].samples.push_back(1e6 * time / states[i].repeats);
  };
  wait();
  for (size_t i = 0; i < calls.size(); ++i) {
    auto time = sample(i);
    if (time > seconds) keep(i, time);
    while (time < kShortest) {
      states[i].repeats *= 2;
      time = sample(i);
    }
  }
  for (int round = 1; round <= kRounds; ++round) {
    for (size_t turn = 0; turn < calls.size(); ++turn) {
      const auto i = (turn + static_cast<size_t>(round)) % calls.size();
      const auto& state = states[i];
      while (state.spent < seconds * round / kRounds || (state.samples.size() < 2 && state.spent < kLongest)) {
        keep(i, sample(i));
      }
    }
  }
  std::vector<Times> result;
  for (auto& [repeats, spent, samples] : states) {
    std::ranges::sort(samples);
    result.push_back({quantile(samples, 0.5), quantile(samples, 0.25), quantile(samples, 0.75), quantile(samples, 0.95),
                      samples.front(), samples.size()});
  }
  return result;
}

namespace {

using Floats4 [[gnu::vector_size(16)]] = float;
using Floats8 [[gnu::vector_size(32)]] = float;
using Floats16 [[gnu::vector_size(64)]] = float;

// Sixteen independent chains of multiply-adds: more than any processor executes at a time.
template <class Floats>
[[gnu::always_inline]] inline float chains(int64_t steps) {
  std::array<Floats, 16> sums{};
  const Floats factor = Floats{} + 0.999F;
  Floats term = Floats{} + 0.001F;
  for (size_t i = 0; i < sums.size(); ++i) sums[i] += 0.1F * static_cast<float>(i);
  for (int64_t step = 0; step < steps; ++step) {
    for (auto& sum : sums) sum = sum * factor + term;
  }
  for (const auto& sum : sums) term += sum;
  return term[0];
}

#ifdef __x86_64__
[[gnu::target("avx512f")]] float chains_512(int64_t steps) {
  return chains<Floats16>(steps);
}
[[gnu::target("avx2,fma")]] float chains_256(int64_t steps) {
  return chains<Floats8>(steps);
}
#endif
float chains_128(int64_t steps) {
  return chains<Floats4>(steps);
}

}  // namespace

double measure_peak(int threads) {
  constexpr int64_t kSteps = 2'000'000;
  auto* run = &chains_128;
  double floats = 4;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) {
    run = &chains_512;
    floats = 16;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    run = &chains_256;
    floats = 8;
  }
#endif
  const auto work = [run] {
    volatile float result = run(kSteps);  // keeps the compiler from removing the work
    (void)result;
  };
  double best = 0;
  for (int attempt = 0; attempt < 100; ++attempt) {
    const auto begin = Clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
    best = std::max(best, 1e-9 * 2 * 16 * floats * static_cast<double>(kSteps) * threads / seconds_since(begin));
  }
  return best;
}

}  // namespace bench
