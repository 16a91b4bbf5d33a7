// SPDX-License-Identifier: Apache-2.0
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/softmax.h>
#include <xattn/attention.h>
#include <xattn/plan.h>

#include <algorithm>
#include <chrono>
#include <limits>

#include "cpu/matrix_product.h"
#include "kernels/kernels.h"

namespace xattn {
namespace {

// The least time of a few calls, in seconds: disturbances only add to it.
template <class F>
double least_seconds(const F& call) {
  using Clock = std::chrono::steady_clock;
  constexpr int kCalls = 15;
  call();
  auto least = std::numeric_limits<double>::max();
  for (int i = 0; i < kCalls; ++i) {
    const auto start = Clock::now();
    call();
    least = std::min(least, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return least;
}

// The speed of a product [m, k] [k, n].
double product_speed(int64_t m, int64_t k, int64_t n) {
  const auto a = at::ones({m, k}), b = at::ones({k, n});
  return 2.0 * static_cast<double>(m * k * n) / least_seconds([&] { detail::matrix_product(a, b); });
}

// speed = flops * size / (size + half), solved for half.
double half_size(double flops, double speed, double size) {
  return std::max(0.0, size * (flops / speed - 1));
}

// The rates of `threads` threads from those of one. Arithmetic scales almost linearly, memory bandwidth up to four threads.
Rates with_threads(Rates one, int threads) {
  const auto n = static_cast<double>(std::max(1, threads));
  one.unit_half_rows = 30;
  one.unit_rows = static_cast<double>(detail::least_many_rows());
  if (!detail::kernels().has_matrix_unit) one.unit_flops = one.unit_half_rows = one.unit_rows = 0;
  one.flops *= n * 0.95 + 0.05;
  one.unit_flops *= n * 0.95 + 0.05;
  one.fused *= n * 0.95 + 0.05;
  one.softmax *= n * 0.95 + 0.05;
  one.memory *= n < 4 ? n : 4;
  one.cache *= n;
  one.half_rows *= n;
  one.start_product += n > 1 ? 1e-6 : 0;
  return one;
}

}  // namespace

Rates Rates::cpu(int threads) {
  const auto flops = detail::kernels().flops_of_modules;
  return with_threads({.flops = flops,
                       .unit_flops = 280e9,
                       .memory = 14e9,
                       .cache = 40e9,
                       .cache_size = 16e6,
                       .half_rows = 6,
                       .half_columns = 12,
                       .half_depth = 8,
                       .start_product = 2.5e-6,
                       .start_small = 0.5e-6,
                       .softmax = 0.6e9,
                       .fused = 0.75 * flops},
                      threads);
}

Rates Rates::kernels(int threads) {
  return with_threads({.flops = detail::kernels().flops,
                       .unit_flops = 350e9,
                       .memory = 25e9,
                       .cache = 80e9,
                       .cache_size = 16e6,
                       .half_rows = 1,
                       .half_columns = 8,
                       .half_depth = 6,
                       .start_product = 0.2e-6,
                       .start_small = 0.05e-6,
                       .softmax = 2.5e9,
                       .fused = 0},
                      threads);
}

Rates Rates::cuda() {
  return {.flops = 40e12,
          .memory = 1.5e12,
          .cache = 5e12,
          .cache_size = 30e6,
          .half_rows = 64,
          .half_columns = 64,
          .half_depth = 64,
          .start_product = 4e-6,
          .start_small = 10e-9,
          .softmax = 100e9,
          .fused = 60e12};
}

Rates Rates::measure() {
  const at::NoGradGuard no_grad;
  const bool has_unit = detail::kernels().has_matrix_unit;
  const int64_t columns = has_unit ? 64 : 768;  // too few for the unit
  Rates rates;
  rates.flops = product_speed(768, 768, columns);
  if (has_unit) {
    const auto least = detail::least_many_rows(), many = std::max<int64_t>(768, 4 * least);
    rates.unit_flops = product_speed(many, 768, 768);
    rates.unit_rows = static_cast<double>(least);
    rates.unit_half_rows = half_size(rates.unit_flops, product_speed(least, 768, 768), rates.unit_rows);
  }
  rates.half_rows = half_size(rates.flops, product_speed(4, 768, columns), 4);
  rates.half_columns = half_size(rates.flops, product_speed(768, 768, 16), 16);
  rates.half_depth = half_size(rates.flops, product_speed(768, 16, columns), 16);

  constexpr int64_t kMany = 1 << 24;  // 64 MB, more than caches hold
  auto target = at::empty({kMany});
  const auto source = at::ones({kMany});
  rates.memory = 2.0 * 4 * kMany / least_seconds([&] { target.copy_(source); });

  const auto little = at::ones({1 << 18});  // 1 MB
  auto copy = at::empty_like(little);
  rates.cache = 2.0 * 4 * static_cast<double>(little.numel()) / least_seconds([&] { copy.copy_(little); });
  rates.cache_size = 16e6;

  const auto tiny = at::ones({1, 1, 1});
  rates.start_product = least_seconds([&] { detail::matrix_product(tiny, tiny); });
  const auto small = at::ones({256, 1, 1});
  rates.start_small = std::max(0.0, (least_seconds([&] { detail::matrix_product(small, small); }) - rates.start_product) / 256);

  const auto logits = at::ones({8, 256, 512});
  rates.softmax = static_cast<double>(logits.numel()) / least_seconds([&] { at::softmax(logits, -1); });
  const auto heads = at::ones({1, 8, 512, 64});
  const double operations = 4.0 * 8 * 512 * 512 * 64;
  rates.fused = operations / least_seconds([&] { attention(heads, heads, heads, {.path = AttentionPath::fused}); });
  return rates;
}

}  // namespace xattn
