// The exact minimiser on a fixed mask, row by row, on gathered matrices.
#pragma once

#include <cstdint>

namespace tailor_fast::decorate {

// Some rows of one layer. Arrays are row-major and `cols` wide.
struct Exact {
  const void* delta;     // float32 [rows, cols]
  const uint8_t* mask;   // [rows, cols]
  const void* rhs;       // float32 [rows, cols], or null for delta * gram
  const void* gram;      // float32 [cols, cols], symmetric
  int64_t rows;
  int64_t cols;
  double damping;
  double tol;
  int64_t max_iterations;
  void* patch;   // float32 [rows, cols]
  double* stats; // [rows, kStats]
};

// Per row: by how much the patch and the bare mask lower the objective of 0, iterations, and whether
// the row lacks the proof.
constexpr int64_t kStats = 4;

void solve_exact(const Exact& problem, int threads);

}  // namespace tailor_fast::decorate
