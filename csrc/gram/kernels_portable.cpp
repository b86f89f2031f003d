#define TAILOR_FAST_PORTABLE
#include "gram/kernels_body.h"
