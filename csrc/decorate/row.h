// One row of the exact solve, on its gathered matrix: conjugate gradients in float32, then in float64
// where the row still lacks the proof that its objective is within `tol` of the minimum.
//
// The proof. The minimum is at least λ |d - p|^2, see reference/exact.py, so a patch may stand
// tol λ |d - p|^2 above it. The height of a patch is r A_KK^-1 r with its residual r, hence at most
// |r|^2 / λ. Conjugate gradients know a closer bound of the height that their own residual s stands
// for; as the square root of the height is a norm of r, sqrt(bound) + |r - s| / sqrt(λ) bounds it.
// Residuals r, the gains and the choice between candidates are computed in float64 from the patch
// itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "decorate/exact.h"
#include "decorate/kernels.h"
#include "decorate/support.h"

namespace tailor_fast::decorate {

constexpr double kRounding = 1e-12;               // share of b that a residual may be rounding
constexpr int64_t kPatience[] = {3, 100};         // iterations per kept weight, float32 and float64

// How far iterations in a precision can lower a residual, and down to which eigenvalue of a matrix
// with a unit diagonal their coefficients are those of that matrix rather than of its rounding.
template <typename Real>
struct Reach;
template <>
struct Reach<float> {
  static constexpr double kResidual = 1e-6, kEigenvalue = 1e-4;
};
template <>
struct Reach<double> {
  static constexpr double kResidual = 0, kEigenvalue = 1e-10;
};

// What a thread needs beside its stack, kept from row to row.
struct Workspace {
  Buffer<double> diagonals, vectors, wide;
  Buffer<float> packed, narrow, strip;
};

template <typename Real>
Buffer<Real>& scratch_of(Workspace& workspace) {
  if constexpr (std::is_same_v<Real, float>) {
    return workspace.narrow;
  } else {
    return workspace.wide;
  }
}

// What a row is solved from.
struct Given {
  const void* delta;        // float32 [cols]
  const int32_t* columns;   // [size], those that are kept
  const double* pull;       // [size]: rhs_K, or (G d_R)_K
  const float* packed;      // A_KK
  const double* diagonal;   // its diagonal, [padded(size)]
  int64_t size;
  double reverted_norm;     // |d|^2 outside the mask
};

// The equations of one row, and what its solution goes through. Vectors are padded with zeros.
class Row {
 public:
  Row(const Exact& problem, const Given& given, Workspace& workspace)
      : problem_(problem),
        packed_(given.packed),
        diagonal_(given.diagonal),
        size_(given.size),
        reverted_norm_(given.reverted_norm),
        workspace_(workspace) {
    const int64_t stride = padded(size_);
    double* memory = workspace.vectors.zeros(kVectors * stride);
    double** all[kVectors] = {&d_, &b_, &p_, &r_, &step_, &after_, &scratch_, &inverse_};
    for (int64_t i = 0; i < kVectors; ++i) *all[i] = memory + i * stride;
    for (int64_t i = 0; i < size_; ++i) {
      d_[i] = load<float>(given.delta, given.columns[i]);
      inverse_[i] = diagonal_[i] > 0 ? 1 / diagonal_[i] : 0;
      largest_ = std::max(largest_, diagonal_[i]);
    }
    kernels().multiply(packed_, diagonal_, d_, scratch_, size_);
    const bool has_right_side = problem_.rhs != nullptr;
    for (int64_t i = 0; i < size_; ++i) {
      const double pull = given.pull[i];
      b_[i] = has_right_side ? pull + problem_.damping * d_[i] : pull + scratch_[i];
      r_[i] = has_right_side ? b_[i] - scratch_[i] : pull;
      p_[i] = d_[i];
    }
  }

  void solve(double* stats) {
    const double bare = gain();
    if (bare < 0) {
      std::fill(p_, p_ + size_, 0.0);
      std::copy(b_, b_ + size_, r_);
    }
    height_ = height_of(length(r_));
    int64_t iterations = 0;
    for (int round = 0; round < 2 && !proved(); ++round) {
      const int64_t limit = std::min(problem_.max_iterations, kPatience[round] * size_);
      iterations += round == 0 ? advance<float>(limit) : advance<double>(limit);
    }
    stats[0] = gain();
    stats[1] = bare;
    stats[2] = static_cast<double>(iterations);
    stats[3] = !proved();
  }

  double value(int64_t i) const { return p_[i]; }

 private:
  static constexpr int64_t kVectors = 8;

  double dot(const double* a, const double* b) const {
    double total = 0;
    for (int64_t i = 0; i < size_; ++i) total += a[i] * b[i];
    return total;
  }
  double length(const double* a) const { return std::sqrt(dot(a, a)); }

  // By how much p lowers the objective of 0.
  double gain() const { return dot(p_, b_) + dot(p_, r_); }

  // Of a residual of that length, at most.
  double height_of(double residual) const {
    return residual == 0 ? 0.0 : residual * residual / problem_.damping;
  }

  // What p may stand above the minimum.
  double allowed() const {
    double distance = reverted_norm_;
    for (int64_t i = 0; i < size_; ++i) distance += (d_[i] - p_[i]) * (d_[i] - p_[i]);
    return problem_.tol * problem_.damping * distance;
  }

  bool proved() const {
    return height_ <= allowed() || length(r_) <= length(b_) * kRounding;
  }

  template <typename Real>
  int64_t advance(int64_t limit);

  const Exact& problem_;
  const float* packed_;
  const double* diagonal_;
  int64_t size_;
  double reverted_norm_;
  Workspace& workspace_;
  double largest_ = 0;  // of the diagonal
  double height_ = 0;   // of p above the minimum, at most
  double *d_, *b_, *p_, *r_, *step_, *after_, *scratch_, *inverse_;
};

inline Solved run(const Solve<float>& equations) { return kernels().solve_float(equations); }
inline Solved run(const Solve<double>& equations) { return kernels().solve_double(equations); }

// Moves p and r by conjugate gradients in Real; where rounding made the objective rise they stay.
template <typename Real>
int64_t Row::advance(int64_t limit) {
  const int64_t stride = padded(size_);
  Real* memory = scratch_of<Real>(workspace_).zeros(6 * stride);
  Real* vectors[6];
  for (int64_t i = 0; i < 6; ++i) vectors[i] = memory + i * stride;
  auto [diagonal, inverse, residual, step, direction, product] = vectors;
  const double size = length(r_), squared = size * size;
  for (int64_t i = 0; i < size_; ++i) {
    diagonal[i] = static_cast<Real>(diagonal_[i]);
    inverse[i] = static_cast<Real>(inverse_[i]);
    residual[i] = static_cast<Real>(r_[i] / size);
  }
  // Less than what is asked: the residual drifts from its recurrence, and |d - p| may shrink.
  const double enough = std::max(std::sqrt(allowed() * problem_.damping), length(b_) * kRounding);
  const double goal = std::max(enough / size / 2, Reach<Real>::kResidual);
  const double lowest = 0.99 * problem_.damping / largest_;
  const Solved solved = run(Solve<Real>{
      packed_, diagonal, inverse, residual, step, direction, product, size_, limit,
      static_cast<Real>(goal * goal), 0.8 * allowed() / squared,
      lowest >= Reach<Real>::kEigenvalue ? lowest : 0.0});
  for (int64_t i = 0; i < size_; ++i) {
    step_[i] = static_cast<double>(step[i]) * size;
    scratch_[i] = p_[i] + step_[i];
  }
  kernels().multiply(packed_, diagonal_, scratch_, after_, size_);
  double fall = 0, drift = 0;
  for (int64_t i = 0; i < size_; ++i) {
    after_[i] = b_[i] - after_[i];
    fall += step_[i] * (r_[i] + after_[i]);
    const double far = after_[i] - static_cast<double>(residual[i]) * size;
    drift += far * far;
  }
  if (fall > 0) {
    std::copy(scratch_, scratch_ + size_, p_);
    std::copy(after_, after_ + size_, r_);
    height_ = height_of(length(r_));
    const double root = std::sqrt(solved.height) * size + std::sqrt(height_of(std::sqrt(drift)));
    if (root * root < height_) height_ = root * root;
  }
  return solved.iterations;
}

}  // namespace tailor_fast::decorate
