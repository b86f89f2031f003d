// Parallel loops, by OpenMP where the build has it. An exception of a body ends the loop: what has
// not begun is left out, and the first exception is thrown again to the caller.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace tailor_fast {

inline int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int used_threads(int64_t count, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
}

// The first exception of a parallel region, which none may leave: that would end the process.
class FirstError {
 public:
  template <typename Run>
  void guard(const Run& run) noexcept {
    if (seen_.load(std::memory_order_relaxed)) return;
    try {
      run();
    } catch (...) {
      if (!seen_.exchange(true)) error_ = std::current_exception();
    }
  }
  // Behind the region, whose end makes the error visible.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> seen_{false};
  std::exception_ptr error_;
};

// Calls body(i) for every i in [0, count). Static schedule, so which thread does what depends on
// `count` and `threads` alone.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  FirstError error;
#ifdef _OPENMP
  const int used = used_threads(count, threads);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
#else
  static_cast<void>(threads);
#endif
  for (int64_t i = 0; i < count; ++i) error.guard([&] { body(i); });
  error.rethrow();
}

// Like parallel_for, for bodies of very different cost: a thread takes the next i when it is free.
// Only for results that do not depend on the thread.
template <typename Body>
void parallel_for_uneven(int64_t count, int threads, const Body& body) {
  FirstError error;
#ifdef _OPENMP
  const int used = used_threads(count, threads);
#pragma omp parallel for schedule(dynamic) num_threads(used) if (used > 1)
#else
  static_cast<void>(threads);
#endif
  for (int64_t i = 0; i < count; ++i) error.guard([&] { body(i); });
  error.rethrow();
}

// Like parallel_for_uneven, for bodies in the order of falling cost and memory: every other thread
// begins at the far end, so that those of most memory do not all share the last cache at a time.
// Calls body(i, thread) with thread in [0, used_threads(count, threads)).
template <typename Body>
void parallel_from_both_ends(int64_t count, int threads, const Body& body) {
  FirstError error;
  std::atomic<int64_t> taken{0}, front{0}, back{count};
#ifdef _OPENMP
  const int used = used_threads(count, threads);
#pragma omp parallel num_threads(used) if (used > 1)
#else
  static_cast<void>(threads);
#endif
  {
    const int thread = this_thread();
    // As many tickets as bodies: the two ends cannot pass each other.
    while (taken++ < count) {
      const int64_t i = thread % 2 == 0 ? front++ : --back;
      error.guard([&] { body(i, thread); });
    }
  }
  error.rethrow();
}

}  // namespace tailor_fast
