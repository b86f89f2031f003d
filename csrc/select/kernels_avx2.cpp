#include "select/isa.h"

#if TAILOR_FAST_X86_KERNELS
#include <immintrin.h>

#include "select/kernels.h"

// After the headers: only what follows may use the instructions.
// GCC's own headers start vectors of no value by reading them.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt")
#define TAILOR_FAST_ISA avx2
#define TAILOR_FAST_AVX2
#include "select/kernels_impl.h"
#endif
