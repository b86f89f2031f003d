// Which of the kernels' instruction sets this CPU runs.
#pragma once

namespace tailor_fast {

// The best of three tables of kernels, one per instruction set.
#if defined(__x86_64__)
#define TAILOR_FAST_BEST(table)                                                               \
  (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&                 \
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")           \
       ? avx512::table                                                                        \
   : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&                       \
           __builtin_cpu_supports("f16c")                                                     \
       ? avx2::table                                                                          \
       : portable::table)
#else
#define TAILOR_FAST_BEST(table) portable::table
#endif

}  // namespace tailor_fast
