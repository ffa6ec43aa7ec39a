// A loop over pieces of work on a pool of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "vec.h"

namespace priorityprop {
inline namespace PRIORITYPROP_ISA {

// Calls fn(i) once for each i < total; a Pool has num_threads() and Schedule(function).
//
// The caller works as well, so that all gets done even if the pool has no thread to spare: a kernel
// may itself run on a thread of the pool. Which thread does what is left to chance, so what a piece
// computes must not depend on it. fn must not throw.
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
  };
  auto work = std::make_shared<Work>();
  auto* body = &fn;
  auto run = [work, body, total] {
    int64_t mine = 0;
    for (int64_t i; (i = work->next.fetch_add(1, std::memory_order_relaxed)) < total; mine++) {
      (*body)(i);
    }
    if (mine > 0 && work->done.fetch_add(mine, std::memory_order_acq_rel) + mine == total) {
      std::lock_guard<std::mutex> lock(work->mutex);
      work->finished.notify_one();
    }
  };
  for (int64_t helper = 1; helper < threads; helper++) pool.Schedule(std::function<void()>(run));
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
  if (all_done()) return;
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, all_done);
}

}  // inline namespace PRIORITYPROP_ISA
}  // namespace priorityprop
