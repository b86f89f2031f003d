// Which instruction sets this build has kernels for. GCC alone takes `#pragma GCC target`; other
// compilers build the baseline, which their own flags may raise.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TAILOR_FAST_X86_KERNELS 1
#else
#define TAILOR_FAST_X86_KERNELS 0
#endif
