// What the compiler's default target runs: SSE2 on x86-64, NEON on aarch64.
#include "select/kernels.h"

#define TAILOR_FAST_ISA baseline
#include "select/kernels_impl.h"
