// A loop over pieces of work on a pool of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "vec.h"

namespace priorityprop {
inline namespace PRIORITYPROP_ISA {

constexpr const char* kNoMemory = "out of memory";

// Calls fn, which returns what is wrong, null if nothing is; what it throws is told so too. XLA does
// not catch: an exception that got there would end the process.
template <class F>
const char* guarded(F&& fn) noexcept {
  try {
    return fn();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  } catch (...) {
    return "a kernel threw an exception";
  }
}

// What a thread does that looks again and again.
inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls fn(i) once for each i < total; a Pool has num_threads() and Schedule(function).
//
// The caller works as well, so that all gets done even if the pool has no thread to spare: a kernel
// may itself run on a thread of the pool. Which thread does what is left to chance, so what a piece
// computes must not depend on it. What fn throws first is thrown here, when no thread is in it any
// more.
template <class Pool, class F>
void parallel_for(Pool& pool, int64_t total, F&& fn) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), total);
  if (threads <= 1) {
    for (int64_t i = 0; i < total; i++) fn(i);
    return;
  }

  // A helper may start when all is done and this call has returned: it finds no piece left, and
  // looks at nothing but what it owns a share of.
  struct Work {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
    std::exception_ptr error;
  };
  auto work = std::make_shared<Work>();
  auto* body = &fn;
  auto run = [work, body, total] {
    int64_t mine = 0;
    for (int64_t i; (i = work->next.fetch_add(1, std::memory_order_relaxed)) < total; mine++) {
      try {
        (*body)(i);
      } catch (...) {
        std::lock_guard<std::mutex> lock(work->mutex);
        if (!work->error) work->error = std::current_exception();
      }
    }
    if (mine > 0 && work->done.fetch_add(mine, std::memory_order_acq_rel) + mine == total) {
      std::lock_guard<std::mutex> lock(work->mutex);
      work->finished.notify_one();
    }
  };
  try {
    for (int64_t helper = 1; helper < threads; helper++) pool.Schedule(std::function<void()>(run));
  } catch (...) {
    // Without memory for more helpers, those that there are do it.
  }
  run();
  auto all_done = [&] { return work->done.load(std::memory_order_acquire) == total; };
  // The last pieces take microseconds, going to sleep and being woken as many.
  for (int spin = 0; spin < 2000 && !all_done(); spin++) pause();
  if (!all_done()) {
    std::unique_lock<std::mutex> lock(work->mutex);
    work->finished.wait(lock, all_done);
  }
  if (work->error) std::rethrow_exception(work->error);
}

// Calls fn(step, part) for each part < parts of each step < steps in turn: what a step does is seen
// by all parts of the next.
//
// A thread does the same part at each step, whose data stays in its caches, and what parts no other
// thread has taken up: until a helper comes, which may be never, the caller does them all. Steps are
// so short that threads wait for each other without going to sleep. fn must not throw.
template <class Pool, class F>
void parallel_steps(Pool& pool, int64_t steps, int64_t parts, F&& fn) {
  if (parts <= 1) {
    for (int64_t step = 0; step < steps; step++) fn(step, 0);
    return;
  }

  struct alignas(64) Turn {
    std::atomic<int64_t> step{0};  // the first at which the part is free
  };
  struct Work {
    explicit Work(int64_t parts) : turns(parts) {}
    std::vector<Turn> turns;
    alignas(64) std::atomic<int64_t> done{0};  // parts, of all steps
  };
  auto work = std::make_shared<Work>(parts);
  auto* body = &fn;
  // As in parallel_for, a helper that comes too late finds nothing free.
  auto run = [work, body, steps, parts](int64_t own) {
    for (int64_t step; (step = work->done.load(std::memory_order_acquire) / parts) < steps;) {
      for (int64_t i = 0; i < parts; i++) {
        const int64_t part = (own + i) % parts;
        std::atomic<int64_t>& turn = work->turns[part].step;
        int64_t free = step;
        // Looked at first: to ask for a place takes it out of the cache of the thread it is of.
        if (turn.load(std::memory_order_relaxed) == free &&
            turn.compare_exchange_strong(free, step + 1)) {
          (*body)(step, part);
          work->done.fetch_add(1, std::memory_order_acq_rel);
        }
      }
      for (int spin = 0; work->done.load(std::memory_order_acquire) < (step + 1) * parts; spin++) {
        if (spin < 10000) {
          pause();
        } else {
          std::this_thread::yield();
        }
      }
    }
  };
  try {
    for (int64_t helper = 1; helper < parts; helper++) {
      pool.Schedule(std::function<void()>([run, helper] { run(helper); }));
    }
  } catch (...) {
    // Without memory for more helpers, those that there are do it.
  }
  run(0);
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
