// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "cpu/huge_pages.h"
#include "cpu/packed.h"

// Who does the steps of a call, and in which pieces of memory.
namespace xattn::detail::engine {

inline int64_t threads() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

template <class F>
void each(int64_t n, const F& f) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Who does the steps of a task: one thread, or all of them together.
struct Team {
  bool all;

  template <class F>
  void each(int64_t n, const F& f) const {
    if (all) return engine::each(n, f);
    for (int64_t i = 0; i < n; ++i) f(i);
  }

  // f(begin, end) for parts of [0, n).
  template <class F>
  void parts(int64_t n, const F& f) const {
    if (!all) return f(0, n);
    at::parallel_for(0, n, 1, f);
  }

  // A product by ranges of whole panels, into plain rows.
  void multiply(const Step& step) const {
    const auto panel = kernels().panel;
    const bool has_many = has_many_rows(step.all_rows, step.n, step.k);
    parts((step.n + panel - 1) / panel, [&](int64_t begin, int64_t end) {
      auto part = step;
      part.n = std::min(step.n, end * panel) - begin * panel;
      part.b = step.b.from_panel(begin);
      part.c += begin * panel;
      if (step.bias) part.bias += begin * panel;
      multiply_part(part, has_many);
    });
  }
};

inline int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// A piece of memory, given out from its front.
class Scratch {
 public:
  explicit Scratch(float* memory) : next_(memory) {}
  float* take(int64_t floats) { return std::exchange(next_, next_ + round_up(floats, 16)); }

 private:
  float* next_;
};

/// What a task goes through besides its rows, in bytes: weights, the same for all rows, and a context, for those of one query.
struct Reads {
  int64_t weights, context;
};

/// What a task takes of scratch, in floats: for each of its rows, and for each of those that it does at a time.
struct Room {
  int64_t row;
  int64_t logits = 0, rows_at_a_time = 0;

  int64_t of(int64_t rows) const { return rows * row + std::min(rows, rows_at_a_time) * logits; }
};

constexpr int64_t kMostScratch = 1 << 25;  // floats of a task, of however long a context

/// f(begin, end, scratch, team) for shares of rows [0, n), of which some products may have many; with scratch for its rows.
template <class RoomOf, class F>
void each_share_of_rows(int64_t n, bool has_many, const Reads& reads, const RoomOf& room_of, const F& f) {
  constexpr int64_t kScratch = 3 << 16;  // floats of a task's scratch: what fits into a core's cache beside a panel of weights
  constexpr int64_t kLeastRows = 14;     // rows from which a product runs at its full speed, about, on weights that are near
  constexpr int64_t kMostRows = 112;     // and on those that come from memory for each task anew
  constexpr int64_t kLeastRowsOfUnit = 128, kMostRowsOfUnit = 320;  // both, where there are many
  constexpr int64_t kNear = 2 << 20;                                // bytes
  constexpr int64_t kRowsOfATeam = 4;  // per thread: with fewer rows all threads work on the same rows
  constexpr int64_t kFar = 64 << 20;   // bytes: from there on up to kLeastRows, so that they are read once and not by each

  if (n == 0) return;
  const auto workers = threads();
  const auto bytes = reads.weights + reads.context;
  const bool share_weights = reads.weights > kNear && reads.context < reads.weights / 8;
  const auto together = bytes > kFar ? kLeastRows : share_weights ? 2 * kRowsOfATeam : kRowsOfATeam;
  const Team team{workers > 1 && n < together * workers};
  const Room room = room_of(team);
  const auto least_rows = has_many ? kLeastRowsOfUnit : kLeastRows, most_rows = has_many ? kMostRowsOfUnit : kMostRows;
  const auto least = std::clamp(least_rows * bytes / kNear, least_rows, most_rows);
  const auto most = std::max<int64_t>(1, std::min(std::max(least, kScratch / room.row), kMostScratch / room.row));
  const auto at_once = team.all ? 1 : workers;
  const auto rounds = (n + most * at_once - 1) / (most * at_once);
  const auto share = (n + rounds * at_once - 1) / (rounds * at_once);
  const auto tasks = (n + share - 1) / share;
  const auto size = room.of(share) + 16 * 16;
  const auto slots = std::min(tasks, at_once);
  const auto memory = in_huge_pages(at::empty({slots, size}, at::kFloat));
  const auto work = [&](int64_t task, int64_t slot) {
    f(task * share, std::min(n, (task + 1) * share), Scratch(mutable_data(memory) + slot * size), team);
  };
  if (slots == 1) {
    for (int64_t task = 0; task < tasks; ++task) work(task, 0);
    return;
  }
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) work(task, at::get_thread_num());
  });
}

}  // namespace xattn::detail::engine
