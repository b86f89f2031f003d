// Per row: gather A_KK, then conjugate gradients in float32, then in float64 where a row still
// lacks the proof. Residuals, and with them the proof, the gains and the choice between candidates,
// are computed in float64 from the patch itself. What is proved, and how, stands in
// reference/exact.py.
//
// Rows go by groups, so that a row of the Gram that has come into the cache serves all of them:
// once where it is multiplied by the reverted deltas, once where A_KK is gathered.
#include "decorate/exact.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/bytes.h"
#include "decorate/kernels.h"
#include "decorate/support.h"

namespace tailor_fast::decorate {
namespace {

constexpr int64_t kWorkspace = int64_t{1} << 22;  // floats of gathered matrices at a time: 16 MiB
constexpr double kRounding = 1e-12;               // share of b that a residual may be rounding
constexpr double kReach = 1e-6;                   // how far float32 iterations can lower a residual
constexpr int64_t kPatience[] = {3, 100};         // iterations per kept weight, float32 and float64

struct Group {
  const Exact& problem;
  int64_t first;  // row of the problem
  int64_t rows;
  Support support;
  std::vector<double> reverted_norm;  // |d|^2 outside the mask
  std::vector<double> pull;           // rhs_K, or (G d_R)_K, in the order of support.columns

  Group(const Exact& p, int64_t begin, int64_t end)
      : problem(p),
        first(begin),
        rows(end - begin),
        support(p.mask + begin * p.cols, end - begin, p.cols),
        reverted_norm(end - begin),
        pull(support.columns.size()) {}

  float delta(int64_t row, int64_t col) const {
    return load<float>(problem.delta, (first + row) * problem.cols + col);
  }
  bool kept(int64_t row, int64_t col) const {
    return problem.mask[(first + row) * problem.cols + col] != 0;
  }
};

void find_reverted_norms(Group& group) {
  for (int64_t r = 0; r < group.rows; ++r) {
    double total = 0;
    for (int64_t c = 0; c < group.problem.cols; ++c) {
      const double d = group.kept(r, c) ? 0.0 : group.delta(r, c);
      total += d * d;
    }
    group.reverted_norm[r] = total;
  }
}

void pull_from_right_side(Group& group) {
  for (int64_t r = 0; r < group.rows; ++r) {
    for (int64_t i = group.support.row_start[r]; i < group.support.row_start[r + 1]; ++i) {
      const int64_t index = (group.first + r) * group.problem.cols + group.support.columns[i];
      group.pull[i] = load<float>(group.problem.rhs, index);
    }
  }
}

// Packed A_KK of the rows [begin, end) of a group, and its diagonals; both by row of the range.
void gather(const Group& group, int64_t begin, int64_t end, const std::vector<float*>& packed,
            const std::vector<double*>& diagonals) {
  const int64_t cols = group.problem.cols;
  const Support& support = group.support;
  for (int64_t r = begin; r < end; ++r) {  // rows past the last one of each matrix
    const int64_t size = support.size(r), panel = size / kPanel, length = panel_length(panel);
    if (size % kPanel == 0) continue;
    float* out = packed[r - begin] + panels_size(panel);
    std::fill(out + size % kPanel * length, out + kPanel * length, 0.0f);
  }
  for (int64_t c = 0; c < cols; ++c) {
    const char* a = at<float>(group.problem.gram, c * cols);
    for (int64_t e = support.column_start[c]; e < support.column_start[c + 1]; ++e) {
      const int64_t row = support.row_of[e], position = support.position_of[e];
      if (row < begin || row >= end) continue;
      const int64_t panel = position / kPanel;
      float* out = packed[row - begin] + panels_size(panel) +
                   (position % kPanel) * panel_length(panel);
      const int32_t* columns = support.columns.data() + support.row_start[row];
      for (int64_t i = 0; i < position; ++i) out[i] = load<float>(a, columns[i]);
      std::fill(out + position, out + panel_length(panel), 0.0f);
      diagonals[row - begin][position] = load<float>(a, c) + group.problem.damping;
    }
  }
}

// The equations of one row, and what its solution goes through. Vectors are padded with zeros.
class Row {
 public:
  Row(const Group& group, int64_t row, const float* packed, const double* diagonal)
      : problem_(group.problem),
        packed_(packed),
        diagonal_(diagonal),
        size_(group.support.size(row)),
        memory_(kVectors * padded(size_)),
        reverted_norm_(group.reverted_norm[row]) {
    const int64_t stride = padded(size_);
    memory_.clear(kVectors * stride);
    double** all[kVectors] = {&d_, &b_, &p_, &r_, &step_, &after_, &scratch_, &inverse_};
    for (int64_t i = 0; i < kVectors; ++i) *all[i] = memory_.data() + i * stride;
    const int64_t start = group.support.row_start[row];
    for (int64_t i = 0; i < size_; ++i) {
      d_[i] = group.delta(row, group.support.columns[start + i]);
      inverse_[i] = diagonal[i] > 0 ? 1 / diagonal[i] : 0;
    }
    kernels().multiply(packed_, diagonal_, d_, scratch_, size_);
    for (int64_t i = 0; i < size_; ++i) {
      const double pull = group.pull[start + i];
      const bool given = problem_.rhs != nullptr;
      b_[i] = given ? pull + problem_.damping * d_[i] : pull + scratch_[i];
      r_[i] = given ? b_[i] - scratch_[i] : pull;
      p_[i] = d_[i];
    }
  }

  void solve(double* stats) {
    const double bare = gain();
    if (bare < 0) {
      std::fill(p_, p_ + size_, 0.0);
      std::copy(b_, b_ + size_, r_);
    }
    int64_t iterations = 0;
    double factor = lacking();
    for (int round = 0; round < 2 && factor < 1; ++round) {
      const int64_t limit = std::min(problem_.max_iterations, kPatience[round] * size_);
      // Half of what is asked: the recurrence and |d - p| both drift from where they started.
      iterations += round == 0 ? advance<float>(std::max(factor / 2, kReach), limit)
                               : advance<double>(factor / 2, limit);
      factor = lacking();
    }
    stats[0] = gain();
    stats[1] = bare;
    stats[2] = static_cast<double>(iterations);
    stats[3] = factor < 1;
  }

  double value(int64_t i) const { return p_[i]; }

 private:
  static constexpr int64_t kVectors = 8;

  double dot(const double* a, const double* b) const {
    double total = 0;
    for (int64_t i = 0; i < size_; ++i) total += a[i] * b[i];
    return total;
  }

  // By how much p lowers the objective of 0.
  double gain() const { return dot(p_, b_) + dot(p_, r_); }

  // By what factor the residual has to fall until it proves the row; 1 where it does.
  double lacking() const {
    double distance = reverted_norm_;
    for (int64_t i = 0; i < size_; ++i) distance += (d_[i] - p_[i]) * (d_[i] - p_[i]);
    const double size = std::sqrt(dot(r_, r_));
    const double proof = std::sqrt(problem_.tol * distance) * problem_.damping;
    const double limit = std::max(proof, std::sqrt(dot(b_, b_)) * kRounding);
    return size > limit ? limit / size : 1.0;
  }

  template <typename Real>
  int64_t advance(double goal, int64_t limit);

  const Exact& problem_;
  const float* packed_;
  const double* diagonal_;
  int64_t size_;
  Buffer<double> memory_;
  double reverted_norm_;
  double *d_, *b_, *p_, *r_, *step_, *after_, *scratch_, *inverse_;
};

int64_t solve(const Solve<float>& equations) { return kernels().solve_float(equations); }
int64_t solve(const Solve<double>& equations) { return kernels().solve_double(equations); }

// Moves p and r by conjugate gradients in Real; where rounding made the objective rise they stay.
template <typename Real>
int64_t Row::advance(double goal, int64_t limit) {
  const int64_t stride = padded(size_);
  Buffer<Real> memory(6 * stride);
  memory.clear(6 * stride);
  Real* vectors[6];
  for (int64_t i = 0; i < 6; ++i) vectors[i] = memory.data() + i * stride;
  auto [diagonal, inverse, residual, step, direction, product] = vectors;
  const double length = std::sqrt(dot(r_, r_));
  for (int64_t i = 0; i < size_; ++i) {
    diagonal[i] = static_cast<Real>(diagonal_[i]);
    inverse[i] = static_cast<Real>(inverse_[i]);
    residual[i] = static_cast<Real>(r_[i] / length);
  }
  const auto target = static_cast<Real>(goal * goal);
  const int64_t iterations = tailor_fast::decorate::solve(
      {packed_, diagonal, inverse, residual, step, direction, product, size_, target, limit});
  double fall = 0;
  for (int64_t i = 0; i < size_; ++i) {
    step_[i] = static_cast<double>(step[i]) * length;
    scratch_[i] = p_[i] + step_[i];
  }
  kernels().multiply(packed_, diagonal_, scratch_, after_, size_);
  for (int64_t i = 0; i < size_; ++i) {
    after_[i] = b_[i] - after_[i];
    fall += step_[i] * (r_[i] + after_[i]);
  }
  if (fall > 0) {
    std::copy(scratch_, scratch_ + size_, p_);
    std::copy(after_, after_ + size_, r_);
  }
  return iterations;
}

void solve_range(const Group& group, int64_t begin, int64_t end) {
  const Exact& problem = group.problem;
  int64_t matrices = 0, vectors = 0;
  for (int64_t r = begin; r < end; ++r) {
    matrices += packed_size(group.support.size(r));
    vectors += padded(group.support.size(r));
  }
  Buffer<float> packed(matrices);
  Buffer<double> diagonals(vectors);
  std::vector<float*> packed_of;
  std::vector<double*> diagonal_of;
  matrices = vectors = 0;
  for (int64_t r = begin; r < end; ++r) {
    packed_of.push_back(packed.data() + matrices);
    diagonal_of.push_back(diagonals.data() + vectors);
    matrices += packed_size(group.support.size(r));
    vectors += padded(group.support.size(r));
  }
  diagonals.clear(vectors);
  gather(group, begin, end, packed_of, diagonal_of);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = group.first + r, start = group.support.row_start[r];
    char* patch = at<float>(problem.patch, row * problem.cols);
    std::memset(patch, 0, problem.cols * sizeof(float));
    Row equations(group, r, packed_of[r - begin], diagonal_of[r - begin]);
    equations.solve(problem.stats + row * kStats);
    for (int64_t i = 0; i < group.support.size(r); ++i) {
      store<float>(patch, group.support.columns[start + i], static_cast<float>(equations.value(i)));
    }
  }
}

void solve_group(const Exact& problem, int64_t begin, int64_t end) {
  Group group(problem, begin, end);
  find_reverted_norms(group);
  if (problem.rhs == nullptr) {
    group.pull = products<double>(problem.gram, group.rows, problem.cols, group.support,
                          [&](int64_t r, int64_t c) -> double {
                            return group.kept(r, c) ? 0.0f : group.delta(r, c);
                          });
  } else {
    pull_from_right_side(group);
  }
  for (int64_t r = 0; r < group.rows;) {
    int64_t stop = r, used = 0;
    do {
      used += packed_size(group.support.size(stop++));
    } while (stop < group.rows && used + packed_size(group.support.size(stop)) <= kWorkspace);
    solve_range(group, r, stop);
    r = stop;
  }
}

template <typename Real>
void find_rise_in(const Rise& problem, int threads) {
  const int64_t cols = problem.cols;
  each_group<Real>(problem.rows, threads, [&](int64_t begin, int64_t end) {
    const Support support(problem.mask + begin * cols, end - begin, cols);
    const auto step = [&](int64_t r, int64_t c) -> double {
      return load<float>(problem.step, (begin + r) * cols + c);
    };
    const auto both = [&](int64_t r, int64_t c) -> double {
      return 2.0 * load<float>(problem.error, (begin + r) * cols + c) + step(r, c);
    };
    const auto pull = products<Real>(problem.gram, end - begin, cols, support, both);
    for (int64_t r = 0; r < end - begin; ++r) {
      double total = 0;
      for (int64_t i = support.row_start[r]; i < support.row_start[r + 1]; ++i) {
        const int64_t c = support.columns[i];
        total += step(r, c) * (pull[i] + problem.damping * both(r, c));
      }
      problem.rise[begin + r] = total;
    }
  });
}

}  // namespace

void solve_exact(const Exact& problem, int threads) {
  each_group<double>(problem.rows, threads, [&](int64_t begin, int64_t end) {
    solve_group(problem, begin, end);
  });
}

void find_rise(const Rise& problem, int threads) {
  if (problem.wide) {
    find_rise_in<double>(problem, threads);
  } else {
    find_rise_in<float>(problem, threads);
  }
}

}  // namespace tailor_fast::decorate
