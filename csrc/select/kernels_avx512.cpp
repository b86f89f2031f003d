#if defined(__x86_64__)
#define TAILOR_FAST_AVX512
#include "select/kernels_body.h"
#endif
