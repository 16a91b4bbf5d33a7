// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <c10/util/FunctionRef.h>

#include <cstdint>

// The threads of this library's kernels: workers that help the calling thread, which never waits for one that has not begun.
// OpenMP's barriers wait for every thread: on a busy machine, each until the system lets the thread run again.
namespace xattn::detail::engine {

/// Threads for work that begins here: at::get_num_threads(), but 1 within a task or a parallel region of LibTorch.
int64_t num_threads();

/// Calls task(i, thread) once for each i in [0, tasks), on the calling thread and on at most threads - 1 workers, each of which
/// begins with neighbouring tasks, the same in each call, and ends with others'. `thread`, in [0, threads), differs between tasks
/// that run at the same time: an index of scratch memory. On one thread, tasks run in ascending order. Within a task, all
/// tasks run on the calling thread. Workers round and treat denormals as the caller does. When all tasks have ended, throws what
/// the first that failed threw.
///
/// Several threads may call at once, and share the workers. The first call that needs a worker starts it; a process made by
/// fork(2) starts its own. Workers look for more tasks for some microseconds, then sleep, and end with the program or library.
void run_tasks(int64_t tasks, int64_t threads, c10::function_ref<void(int64_t i, int64_t thread)> task);

}  // namespace xattn::detail::engine
