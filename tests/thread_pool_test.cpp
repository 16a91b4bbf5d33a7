// SPDX-License-Identifier: Apache-2.0
// Also part of the program for the thread sanitizer.
#include "cpu/thread_pool.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "one_thread.h"

namespace xattn::detail::engine {
namespace {

// Tasks that wait for each other, so that each runs on a thread of its own.
class Rendezvous {
 public:
  explicit Rendezvous(int64_t tasks) : expected_(tasks) {}
  void arrive_and_wait() {
    ++arrived_;
    while (arrived_ < expected_) std::this_thread::yield();
  }

 private:
  const int64_t expected_;
  std::atomic<int64_t> arrived_ = 0;
};

// Runs n tasks that only n threads can end.
void run_on_threads(int64_t n) {
  Rendezvous all(n);
  run_tasks(n, n, [&](int64_t, int64_t) { all.arrive_and_wait(); });
}

TEST(ThreadPoolTest, EachTaskRunsOnceAndNoTwoAtATimeHaveOneThreadsIndex) {
  for (const int64_t tasks : {0, 1, 2, 5, 1000}) {
    for (const int64_t threads : {1, 2, 4, 9}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks)), computing(static_cast<size_t>(threads));
      std::atomic<bool> shared = false;
      run_tasks(tasks, threads, [&](int64_t task, int64_t thread) {
        ++runs[static_cast<size_t>(task)];
        if (++computing.at(static_cast<size_t>(thread)) > 1) shared = true;
        --computing[static_cast<size_t>(thread)];
      });
      EXPECT_TRUE(std::ranges::all_of(runs, [](const auto& count) { return count == 1; })) << tasks << ", " << threads;
      EXPECT_FALSE(shared) << tasks << ", " << threads;
    }
  }
}

TEST(ThreadPoolTest, WorkersComeWheneverTheyAreNeeded) {
  for (int i = 0; i < 300; ++i) {
    run_on_threads(2 + i % 4);
    std::this_thread::sleep_for(std::chrono::microseconds(i % 7 * 50));  // some still look for calls, others sleep
  }
}

TEST(ThreadPoolTest, ACallEndsWithoutWorkers) {
  std::atomic<bool> is_over = false;
  Rendezvous blocked(4);
  std::thread other([&] {  // holds three workers
    run_tasks(4, 4, [&](int64_t, int64_t) {
      blocked.arrive_and_wait();
      while (!is_over) std::this_thread::yield();
    });
  });
  int64_t sum = 0;
  for (int i = 0; i < 100; ++i) {
    std::atomic<int64_t> tasks = 0;
    run_tasks(4, 4, [&](int64_t, int64_t) { ++tasks; });
    sum += tasks;
  }
  EXPECT_EQ(sum, 400);
  is_over = true;
  other.join();
}

TEST(ThreadPoolTest, ManyThreadsCallAtOnce) {
  std::vector<int64_t> sums(24);  // more than calls that get workers at a time
  std::vector<std::thread> callers;
  for (auto& sum : sums) {
    callers.emplace_back([&sum] {
      for (int i = 0; i < 200; ++i) {
        std::vector<int64_t> terms(7);
        run_tasks(7, 3, [&](int64_t task, int64_t) { terms[static_cast<size_t>(task)] = task; });
        for (const auto term : terms) sum += term;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(sums, std::vector<int64_t>(24, 200 * 21));
}

TEST(ThreadPoolTest, TasksOfATaskRunOnItsThread) {
  const xattn::test::Threads threads(3);
  EXPECT_EQ(num_threads(), 3);
  Rendezvous all(3);
  std::atomic<int> wrong = 0;
  run_tasks(3, 3, [&](int64_t, int64_t) {
    all.arrive_and_wait();
    const auto own = std::this_thread::get_id();
    if (num_threads() != 1) ++wrong;
    run_tasks(10, 3, [&](int64_t, int64_t thread) { wrong += thread != 0 || std::this_thread::get_id() != own; });
  });
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(num_threads(), 3);
}

TEST(ThreadPoolTest, TheNumberOfThreadsIsLibTorchs) {
  for (const int count : {1, 4, 2}) {
    const xattn::test::Threads threads(count);
    EXPECT_EQ(num_threads(), count);
  }
}

TEST(ThreadPoolTest, TheFirstErrorReachesTheCallerAfterAllTasks) {
  for (const bool on_caller : {false, true}) {
    const auto caller = std::this_thread::get_id();
    Rendezvous both(2);
    std::atomic<int> ended = 0;
    const auto call = [&] {
      run_tasks(6, 2, [&](int64_t task, int64_t) {
        if (task < 2) both.arrive_and_wait();
        ++ended;
        if (task < 2 && (std::this_thread::get_id() == caller) == on_caller) throw std::runtime_error("of a task");
      });
    };
    EXPECT_THROW(call(), std::runtime_error) << on_caller;
    EXPECT_EQ(ended, 6);
    EXPECT_NO_THROW(run_on_threads(2));
    const xattn::test::Threads threads(2);
    EXPECT_EQ(num_threads(), 2) << "the caller is no longer in a task";
  }
}

TEST(ThreadPoolTest, WorkersTreatDenormalsAsTheCallerDoes) {
  for (const bool flush : {true, false, true}) {
    if (!at::globalContext().setFlushDenormal(flush)) GTEST_SKIP() << "this processor cannot flush denormals";
    Rendezvous all(3);
    std::atomic<int> zeros = 0;
    run_tasks(3, 3, [&](int64_t, int64_t) {
      all.arrive_and_wait();
      volatile float least = std::numeric_limits<float>::min();
      zeros += least / 4 == 0;
    });
    at::globalContext().setFlushDenormal(false);
    EXPECT_EQ(zeros, flush ? 3 : 0);
  }
}

#ifndef __SANITIZE_THREAD__  // which does not see OpenMP, and starts no thread after a fork
// libgomp's entry point of a parallel region, which LibTorch loads: this file is compiled without OpenMP.
TEST(ThreadPoolTest, AParallelRegionOfLibTorchComputesOnItsThread) {
  using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
  const auto region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (!region) GTEST_SKIP() << "LibTorch's threads are not libgomp's";
  const xattn::test::Threads threads(2);
  std::atomic<int64_t> most = 0;
  region([](void* all) { *static_cast<std::atomic<int64_t>*>(all) += num_threads(); }, &most, 2, 0);
  EXPECT_EQ(most, 2) << "one of each thread";
}

TEST(ThreadPoolTest, AForkedProcessHasItsOwnWorkers) {
  run_on_threads(3);
  const auto child = fork();
  if (child == 0) {
    alarm(60);
    run_on_threads(3);
    const auto grandchild = fork();
    run_on_threads(2);
    int status = 0;
    if (grandchild > 0) waitpid(grandchild, &status, 0);
    _exit(status == 0 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  run_on_threads(3);
}
#endif

// A static object that computes when the program ends, after the workers have.
struct Last {
  ~Last() {
    if (!computes) return;
    int sum = 0;
    run_tasks(3, 2, [&sum](int64_t task, int64_t) { sum += static_cast<int>(task); });
    std::fputs(sum == 3 ? "computed" : "failed", stderr);
  }
  bool computes = false;
};

TEST(ThreadPoolDeathTest, AProgramEndsWhileWorkersSleepLookForCallsAndCompute) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto run = [] {
    static Last last;
    last.computes = true;
    run_on_threads(4);
    std::thread([] {
      while (true) run_tasks(8, 3, [](int64_t, int64_t) {});
    }).detach();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    std::exit(0);
  };
  EXPECT_EXIT(run(), testing::ExitedWithCode(0), "computed");
}

}  // namespace
}  // namespace xattn::detail::engine
