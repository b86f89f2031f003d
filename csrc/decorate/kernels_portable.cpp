#define TAILOR_FAST_PORTABLE
#include "decorate/kernels_body.h"
