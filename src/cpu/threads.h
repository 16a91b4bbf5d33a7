// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "cpu/huge_pages.h"
#include "cpu/packed.h"
#include "cpu/tasks.h"

// Runs tasks on threads, each with scratch memory.
namespace xattn::detail::engine {

inline int64_t num_threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// The threads that compute one task: the calling thread, or all.
struct TaskThreads {
  bool all;

  template <class F>
  void each(int64_t n, const F& f) const {
    parts(n, [&f](int64_t begin, int64_t end) {
      for (auto i = begin; i < end; ++i) f(i);
    });
  }

  // Calls f(begin, end) for parts of [0, n).
  template <class F>
  void parts(int64_t n, const F& f) const {
    if (!all) return f(0, n);
    at::parallel_for(0, n, 1, f);
  }

  // Computes a product by ranges of whole panels, into plain rows.
  void multiply(const Product& product) const {
    const auto panel = kernels().panel;
    const bool has_many = has_many_rows(product.all_rows, product.sizes.n, product.sizes.k);
    parts(divided_up(product.sizes.n, panel), [&](int64_t begin, int64_t end) {
      auto part = product;
      part.sizes.n = std::min(product.sizes.n, end * panel) - begin * panel;
      part.b = product.b.from_panel(begin);
      part.c.data += begin * panel;
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

/// Calls f(begin, end, scratch, threads) for shares of the rows [0, work.rows), as `plan_shares` divides them. If the rows cost
/// unequal time, each thread takes the next task when it has finished one, from the last and most expensive rows on.
template <class F>
void each_share_of_rows(const RowWork& work, const F& f) {
  if (work.rows == 0) return;
  const auto shares = plan_shares(work, num_threads(), kernels());
  const auto size = shares.scratch + Scratch::kPadding;
  const auto memory = in_huge_pages(at::empty({shares.at_once, size}, at::kFloat));
  const auto run = [&](int64_t task, int64_t slot) {
    const auto begin = task * shares.rows, end = std::min(work.rows, begin + shares.rows);
    f(begin, end, Scratch(mutable_data(memory) + slot * size), TaskThreads{shares.together});
  };
  if (shares.at_once == 1) {
    for (int64_t task = 0; task < shares.tasks; ++task) run(task, 0);
  } else if (work.is_uneven) {
    std::atomic<int64_t> left = shares.tasks;
    each(shares.at_once, [&](int64_t slot) {
      for (auto task = --left; task >= 0; task = --left) run(task, slot);
    });
  } else {
    each(shares.tasks, [&](int64_t task) { run(task, at::get_thread_num()); });
  }
}

}  // namespace xattn::detail::engine
