// The objectives of a swept patch, of the bare mask and of the base layer, from the sweep's errors.
#pragma once

#include <array>
#include <cstdint>

namespace tailor_fast::decorate {

// With H = R R^T the objective of an error E is |E R|^2. A sweep leaves errors = (delta - patch) R;
// the bare mask has errors + (patch - delta)_K R, and the base layer errors + patch R: two products
// of what is sparse, at a tenth of what the objective itself would take.
struct Changes {
  const float* errors;  // [rows, cols]
  const float* delta;   // [rows, cols]
  const float* patch;   // [rows, cols], 0 outside the mask
  const uint8_t* mask;  // [rows, cols]
  const float* upper;   // R, [cols, cols]
  int64_t rows;
  int64_t cols;
};

// At the patch, at the bare mask, at 0.
using Objectives = std::array<double, 3>;

Objectives find_objectives(const Changes& changes, int threads);

}  // namespace tailor_fast::decorate
