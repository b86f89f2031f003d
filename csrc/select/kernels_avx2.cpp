#if defined(__x86_64__)
#define TAILOR_FAST_AVX2
#include "select/kernels_body.h"
#endif
