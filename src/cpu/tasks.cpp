// SPDX-License-Identifier: Apache-2.0
#include "cpu/tasks.h"

#include "cpu/packed.h"
#include "cpu/tuning.h"

namespace xattn::detail::engine {

namespace {

// Rows below which all threads work on the same rows, so that weights are read once rather than by each thread.
int64_t rows_that_part_threads(const BytesRead& reads, int64_t threads, const Kernels& kernels) {
  const bool mostly_weights = reads.weights > kCoreCache && reads.context < reads.weights / 8;
  if (reads.weights + reads.context > kSharedCache) return kernels.tile_rows * threads;
  return (mostly_weights ? 2 : 1) * kRowsOfAThread * threads;
}

// Rows with which the products of a task run at full speed; more are needed if less of their input stays in the core's cache.
int64_t fast_rows(const RowWork& work, const Kernels& kernels) {
  const auto least = work.has_many_rows ? kRowsOfAThreadOnUnit : kernels.tile_rows;
  const auto most = work.has_many_rows ? kernels.many_block_rows : kernels.block_rows;
  return std::clamp(least * (work.reads.weights + work.reads.context) / kCoreCache, least, most);
}

}  // namespace

RowShares plan_shares(const RowWork& work, int64_t threads, const Kernels& kernels) {
  const bool together = threads > 1 && work.rows < rows_that_part_threads(work.reads, threads, kernels);
  const auto& scratch = together ? work.together : work.apart;
  const auto wanted = std::max(fast_rows(work, kernels), kScratchFloats / scratch.row);
  const auto most = std::max<int64_t>(1, std::min(wanted, kMostScratchFloats / scratch.row));
  const auto at_once = together ? 1 : threads;
  const auto rounds = divided_up(work.rows, most * at_once);  // in which all threads have a task
  auto rows = divided_up(work.rows, rounds * at_once);
  if (work.is_uneven && at_once > 1) {
    rows = std::min(rows, std::max(fast_rows(work, kernels), divided_up(work.rows, kUnevenTasksOfAThread * at_once)));
  }
  const auto tasks = divided_up(work.rows, rows);
  return {together, rows, tasks, scratch.of(rows), std::min(tasks, at_once)};
}

ProductShares plan_product(
    int64_t count, const ProductSizes& sizes, bool has_many_rows, int64_t threads, const Kernels& kernels) {
  const auto [m, n, k] = sizes;
  const auto panels = divided_up(n, kernels.panel);
  threads = std::clamp<int64_t>(2 * count * m * n * k / kOperationsOfATask, 1, threads);
  const auto terms = std::max<int64_t>(1, divided_up(k, std::max<int64_t>(1, divided_up(k, kPackedTerms))));

  // Columns are divided first, because each task packs its own. If there are too few for all threads, rows are divided too.
  const bool left_is_cached = 4 * m * k <= kCoreCache / 2 && !has_many_rows;
  const auto packed_bytes = left_is_cached ? kPackedBytes : kPackedBytesOnce;
  auto column_tasks = divided_up(panels, std::max<int64_t>(1, packed_bytes / (4 * kernels.panel * terms)));
  if (count % threads != 0) column_tasks = std::min(panels, round_up(column_tasks, threads));
  const auto row_tasks = std::min(divided_up(m, kernels.tile_rows), divided_up(threads, count * column_tasks));
  return {threads, row_tasks, column_tasks, divided_up(m, row_tasks), divided_up(panels, column_tasks), terms};
}

}  // namespace xattn::detail::engine
