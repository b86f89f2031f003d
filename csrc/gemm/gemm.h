// Products of float32 matrices, added into place, for the other ops' kernels and native backends.
//
// Why not the library's: on an AVX-512 CPU that is not Intel's the MKL that torch brings runs its
// AVX2 kernels, at half the speed; and no library call leaves out one triangle of the result of two
// different matrices. Every element is summed by one thread in an order that depends on the depth
// alone: the same bits at any number of threads.
#pragma once

#include <cstdint>

namespace tailor_fast::gemm {

struct Product {
  const void* a;  // float32 [rows, depth]; strides in elements
  int64_t a_row, a_col;
  const void* b;  // float32 [depth, cols]
  int64_t b_row, b_col;
  void* c;  // float32 [rows, cols], rows contiguous, in memory of its own
  int64_t c_row;
  int64_t rows, cols, depth;
  float scale;      // c = scale a b,
  bool accumulate;  // or c += scale a b
  bool lower;       // only elements (i, j) with i >= j are asked for; others may be changed
};

void multiply(const Product& product, int threads);

}  // namespace tailor_fast::gemm
