// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "cpu/huge_pages.h"
#include "cpu/packed.h"
#include "cpu/tasks.h"
#include "cpu/thread_pool.h"
#include "cpu/tuning.h"

// Runs tasks on threads, each with scratch memory.
namespace xattn::detail::engine {

// The threads that compute one task: the calling thread, or all.
struct TaskThreads {
  bool all;

  // Calls f(i) for i in [0, n).
  template <class F>
  void each(int64_t n, const F& f) const {
    run_tasks(n, all ? num_threads() : 1, [&f](int64_t i, int64_t) { f(i); });
  }

  // Calls f(begin, end) for parts of [0, n), one for each thread, but of at least `least` (except the only one).
  template <class F>
  void parts(int64_t n, const F& f, int64_t least = 1) const {
    const auto count = std::min(divided_up(n, least), all ? num_threads() : 1);
    run_tasks(count, count, [&](int64_t i, int64_t) { f(n * i / count, n * (i + 1) / count); });
  }

  // Computes a product by ranges of whole panels.
  void multiply(const Product& product) const {
    const auto panel = kernels().panel;
    const bool has_many = has_many_rows(product.all_rows, product.sizes.n, product.sizes.k);
    parts(divided_up(product.sizes.n, panel), [&](int64_t begin, int64_t end) {
      auto part = product;
      part.sizes.n = std::min(product.sizes.n, end * panel) - begin * panel;
      part.b = product.b.from_panel(begin);
      part.c.data += begin * (product.c.in_panels ? product.c.panel_stride : panel);
      if (part.bias) part.bias += begin * panel;
      engine::multiply_part(part, has_many);
    });
  }
};

// Calls f(i) for i in [0, n), on all threads.
template <class F>
void each(int64_t n, const F& f) {
  TaskThreads{.all = true}.each(n, f);
}

// Calls f(begin, end) for parts of [0, n) on all threads; each of the n costs as much as so many operations of arithmetic.
template <class F>
void each_part(int64_t n, int64_t operations, const F& f) {
  TaskThreads{.all = true}.parts(n, f, divided_up(kOperationsOfATask, operations));
}

// A block of memory that is handed out from the front, in whole cache lines.
class Scratch {
 public:
  explicit Scratch(float* memory) : next_(memory) {}
  float* take(int64_t floats) { return std::exchange(next_, next_ + round_up(floats, kLine)); }

  static constexpr int64_t kLine = 16;             // floats
  static constexpr int64_t kPadding = 16 * kLine;  // for rounding up 16 pieces

 private:
  float* next_;
};

/// Calls f(begin, end, scratch, threads) for shares of the rows [0, work.rows), as `plan_shares` divides them; if rows cost
/// unequal time, each thread from its last and most expensive rows on.
template <class F>
void each_share_of_rows(const RowWork& work, const F& f) {
  if (work.rows == 0) return;
  const auto shares = plan_shares(work, num_threads(), kernels());
  const auto size = shares.scratch + Scratch::kPadding;
  const auto memory = in_huge_pages(at::empty({shares.at_once, size}, at::kFloat));
  run_tasks(shares.tasks, shares.at_once, [&](int64_t i, int64_t thread) {
    const auto task = work.is_uneven ? shares.tasks - 1 - i : i;
    const auto begin = task * shares.rows, end = std::min(work.rows, begin + shares.rows);
    f(begin, end, Scratch(mutable_data(memory) + thread * size), TaskThreads{shares.together});
  });
}

}  // namespace xattn::detail::engine
