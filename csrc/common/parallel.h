// Parallel loops, by OpenMP where the build has it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tailor_fast {

inline int used_threads(int64_t count, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count)));
}

// Calls body(i) for every i in [0, count). Static schedule, so which thread does what depends on
// `count` and `threads` alone. The body must not throw: an exception may not leave the region.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  const int used = used_threads(count, threads);
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
#else
  static_cast<void>(threads);
#endif
  for (int64_t i = 0; i < count; ++i) body(i);
}

// Like parallel_for, for bodies of very different cost: a thread takes the next i when it is free.
// Only for results that do not depend on the thread.
template <typename Body>
void parallel_for_uneven(int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  const int used = used_threads(count, threads);
#pragma omp parallel for schedule(dynamic) num_threads(used) if (used > 1)
#else
  static_cast<void>(threads);
#endif
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace tailor_fast
