// SPDX-License-Identifier: Apache-2.0
#include "cpu/thread_pool.h"

#include <ATen/Parallel.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace xattn::detail::engine {

namespace {

using Clock = std::chrono::steady_clock;
using Microseconds = std::chrono::microseconds;

// How long a worker looks for a call before it sleeps. A search that finds one doubles this time, and one in vain halves it:
// where they share a core, a worker that looks keeps the caller from calling. Measured: all times from 5 to 200 us are equally
// fast for loops in quick succession, beside 0 to 4 busy processes. A sleeper may come milliseconds late on a busy machine.
constexpr Microseconds kLeastSearch{20}, kMostSearch{200};
constexpr Microseconds kMostSpin{50};  // of a caller that waits for the last tasks, before it sleeps

thread_local bool in_task = false;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How this thread rounds and treats denormals, which bits of results depend on.
inline uint32_t float_control() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
  return static_cast<uint32_t>(__builtin_aarch64_get_fpcr());
#else
  return 0;
#endif
}

inline void set_float_control([[maybe_unused]] uint32_t control) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(control);
#elif defined(__aarch64__)
  __builtin_aarch64_set_fpcr(control);
#endif
}

// Calls f until it returns true or the time is over; returns what f returned.
template <class F>
bool spin(Microseconds time, const F& f) {
  for (const auto end = Clock::now() + time; Clock::now() < end;) {
    for (int i = 0; i < 16; ++i, pause()) {
      if (f()) return true;
    }
  }
  return false;
}

// The progress of a call, in one word: tasks that no thread has taken (negative when threads have found none left), workers that
// may still join, and workers that have begun and not ended. A worker joins and takes its first task in one step; so once no
// tasks are left, the caller waits only for workers that compute.
struct Progress {
  static constexpr int64_t kTask = int64_t{1} << 32, kPlace = 1 << 16, kWorker = 1;
  static constexpr int64_t kMostTasks = std::numeric_limits<int32_t>::max(), kMostPlaces = (1 << 16) - 1;

  int64_t word;

  int64_t tasks() const { return word >> 32; }
  int64_t places() const { return word >> 16 & kMostPlaces; }
  int64_t workers() const { return word & (kPlace - 1); }
  bool takes_workers() const { return tasks() > 0 && places() > 0; }
};

// A call of run_tasks. Its memory outlives it, so a worker that comes late finds another call or none.
class alignas(64) Call {
 public:
  bool open() { return !is_open_.load(std::memory_order_relaxed) && !is_open_.exchange(true, std::memory_order_acquire); }

  void begin(int64_t tasks, int64_t threads, c10::function_ref<void(int64_t, int64_t)> task) {
    tasks_ = tasks;
    task_ = task;
    parts_ = std::min(threads, kMostParts);
    for (int64_t part = 0; part < parts_; ++part) taken_[part].store(0, std::memory_order_relaxed);
    float_control_ = float_control();
    progress_.store(tasks * Progress::kTask + (threads - 1) * Progress::kPlace);
  }

  bool takes_workers() const { return Progress{progress_.load()}.takes_workers(); }

  // Computes tasks on a worker, first those of a part; returns false if there are none or enough threads.
  bool join(int64_t part) {
    Progress before{progress_.load(std::memory_order_relaxed)};
    do {
      if (!before.takes_workers()) return false;
    } while (!progress_.compare_exchange_weak(before.word, before.word - Progress::kTask - Progress::kPlace + Progress::kWorker,
                                              std::memory_order_acquire, std::memory_order_relaxed));
    set_float_control(float_control_);
    compute(before.tasks(), before.places(), part % parts_);
    if (Progress{progress_.fetch_sub(Progress::kWorker, std::memory_order_acq_rel)}.workers() == 1) {
      ends_.fetch_add(1);
      ends_.notify_one();
    }
    return true;
  }

  // Computes tasks on the calling thread until all have ended; returns the first error.
  std::exception_ptr finish() {
    in_task = true;
    compute(take(), 0, 0);
    in_task = false;
    const auto has_ended = [this] { return Progress{progress_.load(std::memory_order_acquire)}.workers() == 0; };
    if (!has_ended() && !spin(kMostSpin, has_ended)) {
      for (auto ends = ends_.load(); !has_ended(); ends = ends_.load()) ends_.wait(ends);
    }
    auto error = std::exchange(error_, nullptr);
    has_failed_.store(false, std::memory_order_relaxed);
    is_open_.store(false, std::memory_order_release);
    return error;
  }

 private:
  int64_t take() { return Progress{progress_.fetch_sub(Progress::kTask, std::memory_order_relaxed)}.tasks(); }

  // left: tasks before this thread took one, so that some part still has one for it.
  void compute(int64_t left, int64_t thread, int64_t part) {
    for (; left > 0; left = take()) {
      const auto task = [this, &part] {
        for (;; part = (part + 1) % parts_) {
          const auto i = tasks_ * part / parts_ + taken_[part].fetch_add(1, std::memory_order_relaxed);
          if (i < tasks_ * (part + 1) / parts_) return i;
        }
      }();
      try {
        task_(task, thread);
      } catch (...) {
        if (!has_failed_.exchange(true)) error_ = std::current_exception();
      }
    }
  }

  // Tasks are divided into parts, one for each thread. A thread begins with the same part in each call, so that the weights that
  // it reads stay in its core's cache, and goes on with the parts of others.
  static constexpr int64_t kMostParts = 64;

  std::atomic<int64_t> progress_ = 0;
  int64_t tasks_ = 0, parts_ = 0;
  c10::function_ref<void(int64_t, int64_t)> task_;
  uint32_t float_control_ = 0;
  std::atomic<uint32_t> ends_ = 0;  // how often the last worker of a call has ended
  std::atomic<bool> is_open_ = false, has_failed_ = false;
  std::exception_ptr error_;
  std::array<std::atomic<int64_t>, kMostParts> taken_{};  // tasks of each part
};

class Pool {
 public:
  // Returns false, and has done nothing, if too many calls run.
  bool run(int64_t tasks, int64_t threads, c10::function_ref<void(int64_t, int64_t)> task) {
    const auto call = std::ranges::find_if(calls_, &Call::open);
    if (call == calls_.end()) return false;
    const auto places = threads - 1;
    call->begin(tasks, threads, task);
    const auto wanted = std::min(places_ += places, std::max<int64_t>(places, most_));
    if (size_ < wanted) grow(wanted);
    wake(wanted - (size_ - sleepers_));
    const auto error = call->finish();
    places_ -= places;
    if (error) std::rethrow_exception(error);
    return true;
  }

  void stop() {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
    wakings_.fetch_add(static_cast<uint32_t>(workers_.size()));
    wakings_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
  }

 private:
  void grow(int64_t size) {
    const std::lock_guard lock(mutex_);
    size_ = std::max(size_.load(), size);
    try {
      while (!is_stopping_ && std::ssize(workers_) < size)
        workers_.emplace_back([this, part = std::ssize(workers_) + 1] { work(part); });
    } catch (const std::exception&) {
      return;  // the system has no more threads: fewer compute, and no later call asks again
    }
  }

  // part: its own of each call
  void work(int64_t part) {
    in_task = true;
    const auto join_any = [this, part] { return std::ranges::any_of(calls_, [part](Call& call) { return call.join(part); }); };
    auto search = kLeastSearch;
    while (!is_stopping_) {
      if (spin(search, join_any)) {
        search = std::min(2 * search, kMostSearch);
        continue;
      }
      search = std::max(search / 2, kLeastSearch);
      sleep();
    }
  }

  // A sleeper that is to be woken is no longer counted, so that a caller wakes each once, however late it comes.
  void sleep() {
    sleepers_.fetch_add(1);
    if (std::ranges::any_of(calls_, &Call::takes_workers) && take_sleepers(1) == 1) return;
    for (auto wakings = wakings_.load();;) {
      if (wakings == 0) {
        wakings_.wait(0);
        wakings = wakings_.load();
      } else if (wakings_.compare_exchange_weak(wakings, wakings - 1)) {
        return;
      }
    }
  }

  void wake(int64_t most) {
    const auto count = take_sleepers(most);
    if (count == 0) return;
    wakings_.fetch_add(static_cast<uint32_t>(count));
    for (int64_t i = 0; i < count; ++i) wakings_.notify_one();
  }

  int64_t take_sleepers(int64_t most) {
    auto sleepers = sleepers_.load();
    while (true) {
      const auto count = std::min(sleepers, most);
      if (count <= 0) return 0;
      if (sleepers_.compare_exchange_weak(sleepers, sleepers - count)) return count;
    }
  }

  std::array<Call, 16> calls_;
  alignas(64) std::atomic<int64_t> places_ = 0;  // for workers, of all calls
  alignas(64) std::atomic<int64_t> size_ = 0;    // workers
  std::atomic<int64_t> sleepers_ = 0;
  std::atomic<uint32_t> wakings_ = 0;  // sleepers that may wake up
  const int64_t most_ = int64_t{std::thread::hardware_concurrency()} - 1;
  std::atomic<bool> is_stopping_ = false;
  std::mutex mutex_;  // of the workers
  std::vector<std::thread> workers_;
};

// Never deleted, because threads may outlive static objects.
constinit std::atomic<Pool*> current = nullptr;

Pool& pool() {
  static const struct Workers {
    Workers() {
      const auto start = [] { current = new Pool; };
      start();
      pthread_atfork(nullptr, nullptr, start);  // a child has none of its parent's threads
    }
    ~Workers() { current.load()->stop(); }
  } workers;
  return *current;
}

}  // namespace

int64_t num_threads() {
  return in_task || at::in_parallel_region() ? 1 : at::get_num_threads();
}

void run_tasks(int64_t tasks, int64_t threads, c10::function_ref<void(int64_t i, int64_t thread)> task) {
  threads = std::min({threads, tasks, Progress::kMostPlaces});
  if (threads > 1 && tasks <= Progress::kMostTasks && !in_task && pool().run(tasks, threads, task)) return;
  for (int64_t i = 0; i < tasks; ++i) task(i, 0);
}

}  // namespace xattn::detail::engine
