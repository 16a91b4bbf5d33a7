// SPDX-License-Identifier: Apache-2.0
#include "cpu/tasks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "cpu/threads.h"
#include "cpu/tuning.h"

namespace xattn::detail::engine {
namespace {

// The sizes of AVX-512 kernels with a matrix unit, as far as the division into tasks reads them.
Kernels sizes() {
  Kernels kernels{};
  kernels.panel = 32;
  kernels.tile_rows = 14;
  kernels.block_rows = 112;
  kernels.many_block_rows = 320;
  return kernels;
}

constexpr int64_t kThreads = 4;

RowWork work_of(int64_t rows, int64_t weights, int64_t context = 0) {
  return {.rows = rows, .has_many_rows = false, .reads = {weights, context}, .apart = {.row = 1000}, .together = {.row = 4000}};
}

RowShares shares_of(const RowWork& work, int64_t threads = kThreads) {
  return plan_shares(work, threads, sizes());
}

TEST(TasksTest, SharesCoverAllRows) {
  for (const int64_t rows : {1, 3, 16, 17, 100, 1000, 4096, 100000}) {
    for (const int64_t threads : {1, 2, 4, 7}) {
      for (const int64_t bytes : {int64_t{0}, kCoreCache, 8 * kCoreCache, 2 * kSharedCache}) {
        const auto shares = shares_of(work_of(rows, bytes), threads);
        EXPECT_GE(shares.tasks * shares.rows, rows);
        EXPECT_LT((shares.tasks - 1) * shares.rows, rows) << "no task is empty";
        EXPECT_EQ(shares.at_once, shares.together ? 1 : std::min(shares.tasks, threads));
      }
    }
  }
}

TEST(TasksTest, OneThreadNeverComputesTogether) {
  EXPECT_FALSE(shares_of(work_of(1, 2 * kSharedCache), 1).together);
}

TEST(TasksTest, ThreadsComputeFewRowsTogether) {
  const auto together_below = [](int64_t weights, int64_t context) {
    int64_t rows = 1;
    while (shares_of(work_of(rows, weights, context)).together) ++rows;
    return rows;
  };
  EXPECT_EQ(together_below(0, 0), kRowsOfAThread * kThreads);
  EXPECT_EQ(together_below(2 * kCoreCache, 0), 2 * kRowsOfAThread * kThreads);
  EXPECT_EQ(together_below(2 * kCoreCache, kCoreCache), kRowsOfAThread * kThreads);
  EXPECT_EQ(together_below(2 * kSharedCache, 0), sizes().tile_rows * kThreads);
}

TEST(TasksTest, ATaskHasAsManyRowsAsItsScratchFitsIntoTheCache) {
  const auto shares = shares_of(work_of(100000, 0));
  EXPECT_LE(shares.rows, kScratchFloats / 1000);
  EXPECT_GT(shares.rows, kScratchFloats / 1000 * 9 / 10);
  EXPECT_EQ(shares.scratch, shares.rows * 1000);
}

TEST(TasksTest, ATaskHasABlockOfRowsWhereItsWeightsComeFromMemory) {
  auto work = work_of(100000, 2 * kSharedCache);
  work.apart.row = kScratchFloats / 50;
  EXPECT_NEAR(static_cast<double>(shares_of(work).rows), sizes().block_rows, 2);
  work.has_many_rows = true;
  EXPECT_NEAR(static_cast<double>(shares_of(work).rows), sizes().many_block_rows, 3);
}

TEST(TasksTest, UnevenRowsAreDividedIntoSeveralTasksForEachThread) {
  auto work = work_of(4096, 0);
  work.apart.row = 1;
  EXPECT_EQ(shares_of(work).tasks, kThreads);
  work.is_uneven = true;
  EXPECT_GE(shares_of(work).tasks, kUnevenTasksOfAThread * kThreads);
  EXPECT_EQ(shares_of(work, 1).tasks, 1);
  work.rows = 8 * sizes().tile_rows;
  EXPECT_EQ(shares_of(work).rows, sizes().tile_rows) << "fewer would be slow";
}

TEST(TasksTest, UnevenRowsAreComputedOnceEach) {
  for (const int64_t rows : {1, 17, 100, 1000}) {
    auto work = work_of(rows, 0);
    work.is_uneven = true;
    std::vector<int> computed(static_cast<size_t>(rows));
    each_share_of_rows(work, [&](int64_t begin, int64_t end, Scratch scratch, const TaskThreads&) {
      scratch.take((end - begin) * 1000)[0] = 1;
      for (auto row = begin; row < end; ++row) ++computed[static_cast<size_t>(row)];
    });
    EXPECT_EQ(computed, std::vector<int>(static_cast<size_t>(rows), 1));
  }
}

TEST(TasksTest, LongContextsLimitTheRowsOfATask) {
  auto work = work_of(100000, 2 * kSharedCache);
  work.apart.row = kMostScratchFloats / 3;
  EXPECT_EQ(shares_of(work).rows, 3);
  work.apart.row = 2 * kMostScratchFloats;
  EXPECT_EQ(shares_of(work).rows, 1);
}

TEST(TasksTest, ScratchCountsTheLogitsOfTheRowsAtATime) {
  const ScratchSize size{.row = 10, .logits = 100, .rows_at_a_time = 4};
  EXPECT_EQ(size.of(3), 330);
  EXPECT_EQ(size.of(6), 460);
}

TEST(TasksTest, ProductsAreCoveredByTheirTasks) {
  for (const int64_t m : {1, 14, 25, 200, 5000}) {
    for (const int64_t n : {1, 32, 33, 1000, 20000}) {
      for (const int64_t k : {0, 1, 100, 1025, 5000}) {
        for (const int64_t threads : {1, 3, 8}) {
          const auto shares = plan_product(2, {m, n, k}, /*has_many_rows=*/false, threads, sizes());
          EXPECT_GE(shares.row_tasks * shares.rows, m);
          EXPECT_GE(shares.column_tasks * shares.panels * 32, n);
          EXPECT_LE(shares.threads, threads);
          EXPECT_GE(shares.terms, 1);
          EXPECT_LE(shares.terms, kPackedTerms);
        }
      }
    }
  }
}

TEST(TasksTest, ASmallProductRunsOnOneThreadAndALargeOneOnAll) {
  const auto small = plan_product(1, {32, 32, 32}, false, 8, sizes());
  EXPECT_EQ(small.threads, 1);
  EXPECT_EQ(small.row_tasks * small.column_tasks, 1);
  const auto large = plan_product(1, {4096, 4096, 4096}, false, 8, sizes());
  EXPECT_EQ(large.threads, 8);
  EXPECT_EQ(large.row_tasks, 1) << "columns are divided first, as each task packs its own";
  EXPECT_EQ(large.column_tasks % 8, 0);
  EXPECT_EQ(plan_product(1, {4096, 32, 4096}, false, 8, sizes()).row_tasks, 8) << "one panel";
}

TEST(TasksTest, ATaskPacksWhatTheCacheHoldsBesideTheLeftSide) {
  const auto bytes = [](int64_t m) {
    const auto shares = plan_product(1, {m, 4096, 1024}, false, 1, sizes());
    return 4 * shares.panels * 32 * shares.terms;
  };
  EXPECT_LE(bytes(200), kPackedBytes);
  EXPECT_GT(bytes(1000), kPackedBytes);
  EXPECT_LE(bytes(1000), kPackedBytesOnce);
}

}  // namespace
}  // namespace xattn::detail::engine
