#define TAILOR_FAST_PORTABLE
#include "gemm/kernels_body.h"
