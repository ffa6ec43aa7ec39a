// What the drivers share that run kernels under the sanitizers.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <utility>
#include <vector>

// How many more times memory is given, by all threads together; from then on there is none.
std::atomic<int64_t> allocations{INT64_MAX};

inline void* given_or_thrown(void* memory) {
  if (allocations.fetch_sub(1) > 0 && memory) return memory;
  std::free(memory);
  throw std::bad_alloc();
}
void* operator new(std::size_t size) { return given_or_thrown(std::malloc(size)); }
void* operator new(std::size_t size, std::align_val_t align) {
  const std::size_t to = static_cast<std::size_t>(align);
  return given_or_thrown(std::aligned_alloc(to, (size + to - 1) / to * to));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

inline std::atomic<int> wrong{0};

inline void expect(bool good, const char* what) {
  if (!good && wrong++ < 5) std::fprintf(stderr, "wrong: %s\n", what);
}

// Exactly as long as asked for, so that a sanitizer sees what lies one past the end.
inline std::vector<float> random_floats(std::mt19937& random, int64_t count) {
  std::vector<float> floats(count);
  for (float& f : floats) f = std::uniform_real_distribution<float>(-1, 1)(random);
  return floats;
}

// Calls a kernel, which returns what is wrong, with ever more memory; tells whether no memory was an
// error each time, at least once, and with enough of it all is well again.
template <class F>
bool survives_without_memory(F&& kernel) {
  for (int64_t given = 0, failed = 0; given < 10000; given++) {
    allocations = given;
    const char* error = priorityprop::guarded(kernel);
    const bool enough = allocations > 0;
    allocations = INT64_MAX;
    if (enough) return error == nullptr && failed > 0;
    if (error != nullptr && error != priorityprop::kNoMemory) return false;
    failed += error != nullptr;
  }
  return false;
}

// The caller counts as one of its threads.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; i++) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    ready_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return threads_.size() + 1; }
  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    ready_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      ready_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }
  std::vector<std::thread> threads_;
  std::deque<std::function<void()>> tasks_;
  std::mutex mutex_;
  std::condition_variable ready_;
  bool stop_ = false;
};
