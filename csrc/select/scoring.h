// A tensor pair and its scores, a segment of a row at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/bytes.h"
#include "common/float_env.h"
#include "common/parallel.h"
#include "select/kernels.h"

namespace tailor_fast::select {

enum class Normalize { kNone, kTensor, kRow, kRowBlock };

struct Pair {
  const Kernels* kernels;
  const void* base;
  const void* tuned;
  const void* column_weight;  // float32 [cols], null where no sensitivity is used
  int64_t rows, cols;
  Dtype dtype;
  Terms terms;
  double weights[2];  // of s and of v
  Normalize normalize;
  const Affine* affine = nullptr;  // kTensor: one; kRow: one per row
};

// The first element that has no finite score. An index below 0 says that there is none.
struct Fault {
  int64_t index = -1;
  float value = 0;
  explicit operator bool() const { return index >= 0; }
};

inline const Fault& first_of(const Fault& a, const Fault& b) {
  return !a || (b && b.index < a.index) ? b : a;
}

struct Scratch {
  alignas(64) float s[kSegment], v[kSegment], scores[kSegment];
  alignas(64) int32_t keys[kSegment];
};

// As parallel_for, with IEEE floats in every thread.
template <typename Body>
void parallel_ieee(int64_t count, int threads, const Body& body) {
  parallel_for(count, threads, [&](int64_t i) {
    const IeeeFloats guard;
    body(i);
  });
}

// Fetches a stretch of a row that is needed soon.
inline void prefetch(const Pair& pair, int64_t row, int64_t col, int64_t count) {
  constexpr int64_t kLine = 64;
  const int64_t offset = (row * pair.cols + col) * width(pair.dtype);
  for (int64_t i = 0; i < count * width(pair.dtype); i += kLine) {
    __builtin_prefetch(at<char>(pair.base, offset + i));
    __builtin_prefetch(at<char>(pair.tuned, offset + i));
  }
}

// The stored weights of a stretch of a row.
struct Stored {
  const void *base, *tuned, *column_weight;
};
inline Stored stored(const Pair& pair, int64_t row, int64_t col) {
  const int64_t offset = (row * pair.cols + col) * width(pair.dtype);
  return {at<char>(pair.base, offset), at<char>(pair.tuned, offset),
          pair.column_weight == nullptr ? nullptr : at<float>(pair.column_weight, col)};
}

template <typename Table>
auto kernel_of(const Pair& pair, const Table& table) {
  return table[int(pair.dtype)][int(pair.terms)];
}

// Whether terms are finite, or scores no NaN, given the largest magnitude of them as bits.
inline bool is_usable(const Pair& pair, int32_t worst) {
  return worst < kInfinity || (pair.terms == Terms::kScores && worst == kInfinity);
}

// Terms of a stretch of a row into x.s and x.v; false where one of them is not finite.
inline bool terms_of(const Pair& pair, int64_t row, int64_t col, int64_t count, Scratch& x) {
  const Stored from = stored(pair, row, col);
  const auto terms = kernel_of(pair, pair.kernels->terms);
  return is_usable(pair, terms(from.base, from.tuned, from.column_weight, count, x.s, x.v));
}

// Whether a score is one term as it is.
inline bool is_plain(const Pair& pair) {
  if (pair.terms == Terms::kScores) return true;
  return pair.normalize == Normalize::kNone && !has_both(pair.terms) &&
         pair.weights[has_salience(pair.terms) ? 0 : 1] == 1;
}

// Scores of a stretch of a row, or null where one of them does not exist. With kRowBlock, `col` is
// the first column of a block.
inline const float* scores_of(const Pair& pair, int64_t row, int64_t col, int64_t count,
                              Scratch& x) {
  if (pair.normalize == Normalize::kRowBlock) {
    const Stored from = stored(pair, row, col);
    const auto scores = kernel_of(pair, pair.kernels->block_scores);
    const int32_t worst = scores(from.base, from.tuned, from.column_weight, count, pair.weights,
                                 x.s, x.v, x.scores);
    return is_usable(pair, worst) ? x.scores : nullptr;
  }
  if (!terms_of(pair, row, col, count, x)) return nullptr;
  float* s = has_salience(pair.terms) ? x.s : nullptr;
  float* v = has_sensitivity(pair.terms) ? x.v : nullptr;
  if (is_plain(pair)) return s == nullptr ? v : s;
  if (pair.normalize == Normalize::kNone) {
    const float factors[2] = {float(pair.weights[0]), float(pair.weights[1])};
    if (pair.kernels->scale(s, v, count, factors, x.scores) >= kInfinity) return nullptr;
  } else {
    const Affine& affine = pair.affine[pair.normalize == Normalize::kRow ? row : 0];
    pair.kernels->standardise(s, v, count, affine, x.scores);
  }
  return x.scores;
}

// Marks and collects the scores of a stretch of a row; false where one of them does not exist.
inline bool classify(const Pair& pair, int64_t row, int64_t col, int64_t count, Interval interval,
                     Inside inside, Marks marks, Scratch& x, Found& found) {
  const int64_t index = row * pair.cols + col;
  if (is_plain(pair)) {
    const Stored from = stored(pair, row, col);
    const auto classify_terms = kernel_of(pair, pair.kernels->classify_terms);
    return is_usable(pair, classify_terms(from.base, from.tuned, from.column_weight, count,
                                          interval, inside, index, marks, found));
  }
  const float* scores = scores_of(pair, row, col, count, x);
  if (scores == nullptr) return false;
  pair.kernels->classify(scores, count, interval, inside, index, marks, found);
  return true;
}

// First element of a stretch without a finite score, given that there is one, and what it has.
inline Fault find_fault(const Pair& pair, int64_t row, int64_t col, int64_t count, Scratch& x) {
  Pair alone = pair;
  alone.normalize = Normalize::kNone;  // a finite term has a finite z
  for (int64_t i = col; i < col + count; ++i) {
    const int64_t index = row * pair.cols + i;
    const auto is_bad = [](float value) { return !std::isfinite(value); };
    const bool good = pair.normalize == Normalize::kNone ? scores_of(alone, row, i, 1, x) != nullptr
                                                         : terms_of(alone, row, i, 1, x);
    if (good) continue;
    if (pair.terms == Terms::kScores) return {index, x.s[0]};
    alone.terms = Terms::kSalience;
    if (!terms_of(alone, row, i, 1, x)) return {index, x.s[0]};
    alone.terms = pair.terms;
    terms_of(alone, row, i, 1, x);
    if (has_sensitivity(pair.terms) && is_bad(x.v[0])) return {index, x.v[0]};
    return {index, std::numeric_limits<float>::infinity()};  // the sum of finite terms
  }
  return {};
}

// Some columns of some rows.
struct Region {
  int64_t row, rows, col, cols;
  int64_t size() const { return rows * cols; }
  int64_t row_segments() const { return (cols + kSegment - 1) / kSegment; }
  int64_t segments() const { return rows * row_segments(); }
};

// Calls visit(row, col, count) for the segments [begin, end) of a region, in linear order, until it
// returns false.
template <typename Visit>
void each_segment(const Region& region, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t per_row = region.row_segments();
  int64_t row = begin / per_row, segment = begin % per_row;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = segment * kSegment;
    const int64_t count = std::min(kSegment, region.cols - first);
    if (!visit(region.row + row, region.col + first, count)) return;
    if (++segment == per_row) segment = 0, ++row;
  }
}

// Adds the upper half to the lower half of [0, n), padded by 0 to a power of two, until one is
// left.
inline Sums fold(Sums* x, int64_t n) {
  int64_t half = 1;
  while (half < n) half *= 2;
  while (half > 1) {
    half /= 2;
    for (int64_t i = 0; i + half < n; ++i) {
      x[i].one += x[i + half].one;
      x[i].two += x[i + half].two;
    }
    n = std::min(n, half);
  }
  return x[0];
}

inline void set_affine(float pivot, const Sums& sums, int64_t n, double weight, float& mean,
                       float& factor) {
  const double size = static_cast<double>(n);
  const double q = sums.one / size;
  const double deviation = std::sqrt((sums.two - sums.one * q) / (size - 1));
  mean = static_cast<float>(double{pivot} + q);
  factor = deviation >= kSmallestDeviation ? static_cast<float>(weight / deviation) : 0.0f;
}

// S1 and S2 of s and of v over one row, about `pivots`; null takes the row's first elements, which
// it leaves in `own`. `blocks` has room for the sums of every block of the row, twice.
inline Fault row_sums(const Pair& pair, int64_t row, const float* pivots, float* own, Sums* blocks,
                      Scratch& x, Sums* sums) {
  Fault fault;
  const int64_t per_row = (pair.cols + kBlock - 1) / kBlock;
  const Region region{row, 1, 0, pair.cols};
  each_segment(region, 0, region.row_segments(), [&](int64_t, int64_t col, int64_t count) {
    if (!terms_of(pair, row, col, count, x)) {
      fault = find_fault(pair, row, col, count, x);
      return false;
    }
    if (col == 0 && pivots == nullptr) {
      own[0] = x.s[0];
      own[1] = x.v[0];
      pivots = own;
    }
    const int64_t some = (count + kBlock - 1) / kBlock;
    const bool used[2] = {has_salience(pair.terms), has_sensitivity(pair.terms)};
    for (int term = 0; term < 2; ++term) {
      if (!used[term]) continue;
      float* values = term == 0 ? x.s : x.v;
      std::fill(values + count, values + some * kBlock, pivots[term]);
      Sums* out = blocks + term * per_row + col / kBlock;
      pair.kernels->block_sums(values, some, pivots[term], out);
    }
    return true;
  });
  if (fault) return fault;
  for (int term = 0; term < 2; ++term) sums[term] = fold(blocks + term * per_row, per_row);
  return fault;
}

// Mean and factor of every row, or of the tensor: one pass over the pair. `affine` has an entry per
// unit of normalisation.
inline Fault measure(const Pair& pair, Affine* affine, int threads) {
  const bool whole = pair.normalize == Normalize::kTensor;
  const int64_t per_row = (pair.cols + kBlock - 1) / kBlock;
  float pivots[2] = {0, 0};
  std::vector<Sums> totals(whole ? 2 * pair.rows : 0);
  if (whole) {
    const IeeeFloats guard;
    Scratch x = {};
    if (!terms_of(pair, 0, 0, 1, x)) return find_fault(pair, 0, 0, 1, x);
    pivots[0] = x.s[0];
    pivots[1] = x.v[0];
  }
  const int64_t tasks = std::min<int64_t>(pair.rows, int64_t{threads} * 8);
  std::vector<Fault> faults(tasks);
  parallel_ieee(tasks, threads, [&](int64_t task) {
    Scratch x = {};
    std::vector<Sums> blocks(2 * per_row);
    for (int64_t row = pair.rows * task / tasks; row < pair.rows * (task + 1) / tasks; ++row) {
      Sums sums[2];
      float own[2];
      faults[task] = row_sums(pair, row, whole ? pivots : nullptr, own, blocks.data(), x, sums);
      if (faults[task]) return;
      for (int term = 0; term < 2; ++term) {
        if (whole) {
          totals[term * pair.rows + row] = sums[term];
        } else {
          set_affine(own[term], sums[term], pair.cols, pair.weights[term], affine[row].mean[term],
                     affine[row].factor[term]);
        }
      }
    }
  });
  Fault fault;
  for (const Fault& found : faults) fault = first_of(fault, found);
  if (fault || !whole) return fault;
  const IeeeFloats guard;
  for (int term = 0; term < 2; ++term) {
    const Sums sums = fold(totals.data() + term * pair.rows, pair.rows);
    set_affine(pivots[term], sums, pair.rows * pair.cols, pair.weights[term], affine->mean[term],
               affine->factor[term]);
  }
  return fault;
}

}  // namespace tailor_fast::select
