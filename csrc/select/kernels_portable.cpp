#define TAILOR_FAST_PORTABLE
#include "select/kernels_body.h"
