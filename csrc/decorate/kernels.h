// The kernels of `decorate` that exist once per instruction set, and the choice among them.
#pragma once

#include <cstdint>

namespace tailor_fast::decorate {

// A_KK of one row, packed: its strictly lower triangle by panels of kPanel rows. All rows of a panel
// are as long as its last one, rounded up to kPad, and zero beyond their own entries; the same holds
// for the rows past the last one. So a matrix-vector product reads each entry once and uses it twice,
// for itself and its mirror image.
constexpr int64_t kPanel = 4;
constexpr int64_t kPad = 16;  // floats; the widest vector

constexpr int64_t padded(int64_t size) { return (size + kPad - 1) / kPad * kPad; }
constexpr int64_t panel_length(int64_t panel) { return padded((panel + 1) * kPanel); }

// Floats of the first `panels` panels: lengths grow by kPad every kPad / kPanel panels.
constexpr int64_t panels_size(int64_t panels) {
  const int64_t step = kPad / kPanel, full = panels / step;
  return kPanel * kPad * (full + 1) * (step * full / 2 + panels % step);
}

// Floats of a packed matrix of `size` rows.
constexpr int64_t packed_size(int64_t size) { return panels_size((size + kPanel - 1) / kPanel); }

// What one solve works on. Vectors have padded(size) elements and are zero beyond `size`.
template <typename Real>
struct Solve {
  const float* packed;
  const Real* diagonal;  // of A, damping included
  const Real* inverse;   // of `diagonal`, 0 where that is 0
  Real* residual;        // overwritten
  Real* step;            // the result
  Real* direction;       // scratch, as the next
  Real* product;
  int64_t size;
  int64_t max_iterations;
  Real target;    // squared norm of the residual at which to end
  double height;  // or height above the minimum that is proved
  double lowest;  // no eigenvalue of A scaled to a unit diagonal is lower; 0 where nothing is known
};

struct Solved {
  int64_t iterations;
  double height;  // what is proved of it; infinity or NaN where nothing is
};

constexpr int64_t kSweepRows = 4;  // that are swept together

// One block of columns for the sweeps. All arrays are row-major; strides are in elements.
struct Sweep {
  float* weight;  // [rows, width], moved in place
  int64_t weight_stride;
  const uint8_t* mask;  // [rows, width]: a weight with 0 is settled at the target
  int64_t mask_stride;
  const float* target;  // [rows, width], or null for 0
  int64_t target_stride;
  const float* factor;    // [width, padded(width)]: strictly upper triangle, signed, zero elsewhere
  const float* diagonal;  // [width]
  float* errors;          // [rows, width]; columns [first, last) are written
  int64_t errors_stride;
  int64_t width;
  int64_t first;  // columns [first, last) are settled
  int64_t last;
};

// The fused score of the authors' code for one block. A row whose std is 0 has NaN or, guarded, 0.
struct Score {
  const float* weight;  // [rows, width], as it stands now
  int64_t weight_stride;
  const float* salience;  // [rows, width]
  const float* squares;   // [width]: U_jj squared
  float* score;           // [rows, width]
  int64_t width;
  float salience_weight;
  float sensitivity_weight;
  bool guarded;
};

// Sparse rows times one strip of a dense matrix: two sets of values on one support.
struct Steps {
  const int32_t* columns;  // ascending; those of row r are [starts[r], starts[r + 1])
  const int64_t* starts;
  const float* first;   // values, as `columns`
  const float* second;
  const float* strip;   // [cols, kernels().strip], rows [0, width of the strip's last column)
  const float* errors;  // [rows, cols], at the strip's first column
  int64_t errors_stride;
  int64_t stop;   // columns from here on take no part: the matrix is 0 there
  int64_t width;  // columns of the strip that are in the matrix
};

struct Kernels {
  int64_t strip;  // columns of Steps::strip
  // sums[k] += dot product of x[rows[k]] and `a`, which is float32 at any address.
  void (*dots)(const float* x, int64_t stride, const int32_t* rows, int64_t count, const void* a,
               int64_t size, double* sums);
  // out[i] = a[columns[i]], where `columns` are the `count` first ones that `mask` keeps.
  void (*gather)(const void* a, const uint8_t* mask, const int32_t* columns, int64_t count,
                 float* out);
  // y = A x.
  void (*multiply)(const float* packed, const double* diagonal, const double* x, double* y,
                   int64_t size);
  // Conjugate gradients, preconditioned by the diagonal.
  Solved (*solve_float)(const Solve<float>& solve);
  Solved (*solve_double)(const Solve<double>& solve);
  // Settles the columns of rows [begin, end), with kSweepRows * padded(width) floats of scratch.
  void (*sweep)(const Sweep& sweep, int64_t begin, int64_t end, float* scratch);
  // With padded(width) floats of scratch.
  void (*score)(const Score& score, int64_t begin, int64_t end, float* row);
  // Adds to sums[3] the squares of errors, of errors + first strip and of errors + second strip,
  // over rows [0, rows).
  void (*add_squares)(const Steps& steps, int64_t rows, double* sums);
};

// Those of the instruction set in use.
const Kernels& kernels();

}  // namespace tailor_fast::decorate

namespace tailor_fast::avx512 {
extern const decorate::Kernels kDecorate;
}
namespace tailor_fast::avx2 {
extern const decorate::Kernels kDecorate;
}
namespace tailor_fast::portable {
extern const decorate::Kernels kDecorate;
}
