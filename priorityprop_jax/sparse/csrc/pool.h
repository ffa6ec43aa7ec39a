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
    return "a kernel of a sparse product threw an exception";
  }
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
  for (int spin = 0; spin < 2000 && !all_done(); spin++) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  if (!all_done()) {
    std::unique_lock<std::mutex> lock(work->mutex);
    work->finished.wait(lock, all_done);
  }
  if (work->error) std::rethrow_exception(work->error);
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
