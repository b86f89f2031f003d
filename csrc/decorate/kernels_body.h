// The kernels themselves, compiled once per instruction set by the files beside this one.
#include "common/simd.h"
#include "decorate/kernels.h"

TAILOR_FAST_KERNELS_BEGIN

using decorate::kPanel;
using decorate::kSweepRows;
using decorate::padded;
using decorate::panel_length;

// Dot products of `count` vectors with `a`: its conversion serves them all.
template <int64_t count>
TAILOR_FAST_INLINE void some_dots(const float* x, int64_t stride, const int32_t* rows,
                                  const char* a, int64_t size, double* totals) {
  constexpr int64_t width = kDoubleLanes;
  const float* some[count];
  for (int64_t k = 0; k < count; ++k) some[k] = x + rows[k] * stride;
  Doubles sums[count][2] = {};
  int64_t i = 0;
  for (; i + 2 * width <= size; i += 2 * width) {
    const Doubles low = Of<double>::widen(a + i * 4), high = Of<double>::widen(a + (i + width) * 4);
    for (int64_t k = 0; k < count; ++k) {
      sums[k][0] = fused(Of<double>::widen(some[k] + i), low, sums[k][0]);
      sums[k][1] = fused(Of<double>::widen(some[k] + i + width), high, sums[k][1]);
    }
  }
  for (int64_t k = 0; k < count; ++k) totals[k] += sum_lanes(sums[k][0] + sums[k][1]);
  for (; i < size; ++i) {
    float value;
    __builtin_memcpy(&value, a + i * 4, sizeof(value));
    for (int64_t k = 0; k < count; ++k) totals[k] += double{some[k][i]} * double{value};
  }
}

static void dots(const float* x, int64_t stride, const int32_t* rows, int64_t count,
                 const void* floats, int64_t size, double* sums) {
  const auto* a = static_cast<const char*>(floats);
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) some_dots<4>(x, stride, rows + k, a, size, sums + k);
  if (count - k == 3) some_dots<3>(x, stride, rows + k, a, size, sums + k);
  if (count - k == 2) some_dots<2>(x, stride, rows + k, a, size, sums + k);
  if (count - k == 1) some_dots<1>(x, stride, rows + k, a, size, sums + k);
}

static void gather(const void* from, const uint8_t* mask, const int32_t* columns, int64_t count,
                   float* out) {
  const auto* a = static_cast<const char*>(from);
  int64_t done = 0;
#if defined(TAILOR_FAST_AVX512)
  // Whole vectors, packed by their masks: faster than one by one from an eighth of the columns on.
  const int64_t end = count == 0 ? 0 : columns[count - 1] + 1;
  if (count * 8 >= end) {
    for (int64_t i = 0; i + kLanes <= end; i += kLanes) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask + i));
      const __mmask16 kept = _mm_test_epi8_mask(bytes, bytes);
      const auto some = static_cast<unsigned>(__builtin_popcount(kept));
      const __m512 values = _mm512_maskz_compress_ps(kept, _mm512_loadu_ps(a + i * 4));
      _mm512_mask_storeu_ps(out + done, static_cast<__mmask16>((1u << some) - 1), values);
      done += some;
    }
  }
#else
  static_cast<void>(mask);
#endif
  for (; done < count; ++done) {
    __builtin_memcpy(out + done, a + int64_t{columns[done]} * 4, sizeof(float));
  }
}

// y = A x; all arrays are padded.
template <typename Real>
TAILOR_FAST_INLINE void packed_multiply(const float* packed, const Real* diagonal, const Real* x,
                                        Real* y, int64_t size) {
  typedef typename Of<Real>::Vector Vector;
  constexpr int64_t width = Of<Real>::kWidth;
  for (int64_t i = 0; i < padded(size); i += width) {
    store_vector(y + i, load_vector<Vector>(diagonal + i) * load_vector<Vector>(x + i));
  }
  for (int64_t panel = 0; panel * kPanel < size; ++panel) {
    const int64_t row = panel * kPanel, length = panel_length(panel);
    Vector sums[kPanel] = {}, heads[kPanel];
    for (int64_t k = 0; k < kPanel; ++k) heads[k] = Of<Real>::all(x[row + k]);
    for (int64_t i = 0; i < length; i += width) {
      const Vector xs = load_vector<Vector>(x + i);
      Vector ys[2] = {load_vector<Vector>(y + i), {}};  // two chains of additions, not one
      for (int64_t k = 0; k < kPanel; ++k) {
        const Vector a = Of<Real>::widen(packed + k * length + i);
        sums[k] = fused(a, xs, sums[k]);
        ys[k % 2] = fused(a, heads[k], ys[k % 2]);
      }
      store_vector(y + i, ys[0] + ys[1]);
    }
    Real totals[kPanel];
    for (int64_t k = 0; k < kPanel; ++k) totals[k] = sum_lanes(sums[k]);
    for (int64_t k = 0; k < kPanel; ++k) y[row + k] += totals[k];
    packed += kPanel * length;
  }
}

static void multiply_double(const float* packed, const double* diagonal, const double* x, double* y,
                            int64_t size) {
  packed_multiply<double>(packed, diagonal, x, y, size);
}

template <typename Real>
TAILOR_FAST_INLINE Real dot_padded(const Real* a, const Real* b, int64_t size) {
  typedef typename Of<Real>::Vector Vector;
  constexpr int64_t width = Of<Real>::kWidth;
  Vector sums = {};
  for (int64_t i = 0; i < padded(size); i += width) {
    sums = fused(load_vector<Vector>(a + i), load_vector<Vector>(b + i), sums);
  }
  return sum_lanes(sums);
}

// With the residual r the objective stands r A^-1 r above its minimum. Conjugate gradients and
// Gauss-Radau quadrature share their coefficients, which gives an upper bound of it in three
// operations (Golub & Meurant, 1994; Meurant & Tichy, Numerical Algorithms 62, 2013): reach times
// energy, from a lower bound of the eigenvalues. It is soon within a small factor of the truth, which
// |r|^2 times the largest eigenvalue of A^-1 exceeds by thousands.
template <typename Real>
TAILOR_FAST_INLINE decorate::Solved conjugate_gradients(const decorate::Solve<Real>& s) {
  typedef typename Of<Real>::Vector Vector;
  constexpr int64_t width = Of<Real>::kWidth;
  const int64_t end = padded(s.size);
  const double unknown = __builtin_inf();
  for (int64_t i = 0; i < end; ++i) {
    s.step[i] = 0;
    s.direction[i] = s.residual[i] * s.inverse[i];
  }
  Real energy = dot_padded(s.residual, s.direction, s.size);
  double reach = s.lowest > 0 ? 1 / s.lowest : unknown;
  double height = reach * static_cast<double>(energy);
  if (!(dot_padded(s.residual, s.residual, s.size) > s.target)) return {0, height};
  for (int64_t iteration = 1; iteration <= s.max_iterations; ++iteration) {
    packed_multiply<Real>(s.packed, s.diagonal, s.direction, s.product, s.size);
    const Real curvature = dot_padded(s.direction, s.product, s.size);
    if (!(curvature > 0)) return {iteration, unknown};  // rounding, or a Gram that is not one
    const Real length = energy / curvature;
    const Vector lengths = Of<Real>::all(length);
    Vector squares = {}, energies = {};
    for (int64_t i = 0; i < end; i += width) {
      const Vector direction = load_vector<Vector>(s.direction + i);
      store_vector(s.step + i, fused(lengths, direction, load_vector<Vector>(s.step + i)));
      const Vector product = load_vector<Vector>(s.product + i);
      const Vector residual = fused(-lengths, product, load_vector<Vector>(s.residual + i));
      store_vector(s.residual + i, residual);
      squares = fused(residual, residual, squares);
      energies = fused(residual * residual, load_vector<Vector>(s.inverse + i), energies);
    }
    const Real next = sum_lanes(energies), ratio = next / energy;
    const double gap = reach - static_cast<double>(length);
    reach = gap > 0 && gap < unknown ? gap / (s.lowest * gap + static_cast<double>(ratio)) : unknown;
    height = reach * static_cast<double>(next);
    if (!(sum_lanes(squares) > s.target) || height <= s.height) return {iteration, height};
    energy = next;
    const Vector ratios = Of<Real>::all(ratio);
    for (int64_t i = 0; i < end; i += width) {
      const Vector scaled = load_vector<Vector>(s.residual + i) * load_vector<Vector>(s.inverse + i);
      store_vector(s.direction + i, fused(ratios, load_vector<Vector>(s.direction + i), scaled));
    }
  }
  return {s.max_iterations, height};
}

static decorate::Solved solve_float(const decorate::Solve<float>& s) {
  return conjugate_gradients(s);
}
static decorate::Solved solve_double(const decorate::Solve<double>& s) {
  return conjugate_gradients(s);
}

// Some rows at a time: what a row waits for, a division behind a store, passes while others work.
template <int64_t count>
TAILOR_FAST_INLINE void sweep_some(const decorate::Sweep& s, int64_t first, float* scratch) {
  const int64_t stride = padded(s.width);
  float* rows[count];
  for (int64_t k = 0; k < count; ++k) {
    rows[k] = scratch + k * stride;
    __builtin_memcpy(rows[k], s.weight + (first + k) * s.weight_stride, s.width * sizeof(float));
    for (int64_t i = s.width; i < stride; ++i) rows[k][i] = 0;
  }
  for (int64_t j = s.first; j < s.last; ++j) {
    Floats errors[count];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t r = first + k;
      const float target = s.target == nullptr ? 0.0f : s.target[r * s.target_stride + j];
      const float error = (rows[k][j] - target) / s.diagonal[j];
      const float kept = s.mask[r * s.mask_stride + j] != 0 ? 0.0f : error;
      s.errors[r * s.errors_stride + j] = kept;
      errors[k] = Of<float>::all(kept);
    }
    const float* factor = s.factor + j * stride;
    for (int64_t i = j / kLanes * kLanes; i < stride; i += kLanes) {
      const Floats part = load_vector<Floats>(factor + i);
      for (int64_t k = 0; k < count; ++k) {
        store_vector(rows[k] + i, fused(errors[k], part, load_vector<Floats>(rows[k] + i)));
      }
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    __builtin_memcpy(s.weight + (first + k) * s.weight_stride, rows[k], s.width * sizeof(float));
  }
}

static void sweep_rows(const decorate::Sweep& s, int64_t begin, int64_t end, float* scratch) {
  int64_t r = begin;
  for (; r + kSweepRows <= end; r += kSweepRows) sweep_some<kSweepRows>(s, r, scratch);
  for (; r < end; ++r) sweep_some<1>(s, r, scratch);
}

// z = (x - mean) / std, unbiased; 1 / std and the mean in float64. One element has no std.
struct Moments {
  double mean;
  double std;
};

static Moments moments(const float* x, int64_t size) {
  constexpr int64_t width = kDoubleLanes;
  Doubles sums = {}, squares = {};
  int64_t i = 0;
  for (; i + width <= size; i += width) sums += Of<double>::widen(x + i);
  double total = sum_lanes(sums);
  for (int64_t k = i; k < size; ++k) total += x[k];
  const double mean = total / size;
  const Doubles means = Of<double>::all(mean);
  for (i = 0; i + width <= size; i += width) {
    const Doubles far = Of<double>::widen(x + i) - means;
    squares = fused(far, far, squares);
  }
  double square = sum_lanes(squares);
  for (; i < size; ++i) square += (x[i] - mean) * (x[i] - mean);
  return {mean, __builtin_sqrt(square / static_cast<double>(size - 1))};
}

static void score_rows(const decorate::Score& s, int64_t begin, int64_t end, float* row) {
  for (int64_t r = begin; r < end; ++r) {
    const float* weight = s.weight + r * s.weight_stride;
    const float* salience = s.salience + r * s.width;
    float* score = s.score + r * s.width;
    for (int64_t j = 0; j < s.width; ++j) row[j] = weight[j] * weight[j] / s.squares[j];
    const float* parts[] = {salience, row};
    const float weights[] = {s.salience_weight, s.sensitivity_weight};
    for (int64_t j = 0; j < s.width; ++j) score[j] = 0;
    for (int part = 0; part < 2; ++part) {
      const Moments m = moments(parts[part], s.width);
      if (s.guarded && !(m.std > 0)) continue;
      const auto mean = static_cast<float>(m.mean), std = static_cast<float>(m.std);
      const float* x = parts[part];
      for (int64_t j = 0; j < s.width; ++j) score[j] += weights[part] * ((x[j] - mean) / std);
    }
  }
}

constexpr int64_t kAhead = 8;          // entries
constexpr int64_t kStrip = 4 * kLanes;  // both sets of sums and one row of the strip in registers

// Adds the squares of one row of a strip to `total`.
TAILOR_FAST_INLINE void add_row_squares(const float* row, Doubles& total) {
  for (int64_t i = 0; i < kStrip; i += kDoubleLanes) {
    const Doubles wide = Of<double>::widen(row + i);
    total = fused(wide, wide, total);
  }
}

static void add_squares(const decorate::Steps& s, int64_t rows, double* sums_of_squares) {
  Doubles totals[3] = {};
  for (int64_t r = 0; r < rows; ++r) {
    Floats sums[2][4] = {};
    float errors[kStrip] = {};
    __builtin_memcpy(errors, s.errors + r * s.errors_stride, s.width * sizeof(float));
    for (int64_t k = 0; k < 4; ++k) {
      sums[0][k] = sums[1][k] = load_vector<Floats>(errors + k * kLanes);
    }
    for (int64_t e = s.starts[r]; e < s.starts[r + 1] && s.columns[e] < s.stop; ++e) {
      if (e + kAhead < s.starts[r + 1]) {  // a strip fills the second cache
        const float* later = s.strip + s.columns[e + kAhead] * kStrip;
        for (int64_t k = 0; k < 4; ++k) __builtin_prefetch(later + k * kLanes);
      }
      const float* row = s.strip + s.columns[e] * kStrip;
      const Floats one = Of<float>::all(s.first[e]), other = Of<float>::all(s.second[e]);
      for (int64_t k = 0; k < 4; ++k) {
        const Floats value = load_vector<Floats>(row + k * kLanes);
        sums[0][k] = fused(one, value, sums[0][k]);
        sums[1][k] = fused(other, value, sums[1][k]);
      }
    }
    add_row_squares(errors, totals[0]);
    for (int step = 0; step < 2; ++step) {
      float row[kStrip];
      for (int64_t k = 0; k < 4; ++k) store_vector(row + k * kLanes, sums[step][k]);
      add_row_squares(row, totals[step + 1]);
    }
  }
  for (int i = 0; i < 3; ++i) sums_of_squares[i] += sum_lanes(totals[i]);
}

extern const decorate::Kernels kDecorate;
const decorate::Kernels kDecorate = {kStrip,       &dots,         &gather,     &multiply_double,
                                     &solve_float, &solve_double, &sweep_rows, &score_rows,
                                     &add_squares};

TAILOR_FAST_KERNELS_END
