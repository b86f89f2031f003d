#include "select/isa.h"

#if TAILOR_FAST_X86_KERNELS
#include <immintrin.h>

#include "select/kernels.h"

// After the headers: only what follows may use the instructions.
// GCC's own headers start vectors of no value by reading them.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512,avx2,fma,bmi,bmi2,popcnt")
#define TAILOR_FAST_ISA avx512
#define TAILOR_FAST_AVX512
#include "select/kernels_impl.h"
#endif
