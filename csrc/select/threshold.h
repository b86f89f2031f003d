// An interval of scores that holds the one of rank k: an estimate from a sample, or the exact score.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "select/keys.h"
#include "select/scoring.h"

namespace tailor_fast::select {

constexpr float kNoBound = std::numeric_limits<float>::infinity();
constexpr int64_t kMostCells = 2048;   // cells of kBlock elements in a sample
constexpr int64_t kSparsest = 16;      // a sample is at most this part of a region
constexpr double kDeviations = 5;      // half width of the estimate

// Bits that look random and depend on `seed` alone (splitmix64).
inline uint64_t mix(uint64_t seed) {
  uint64_t z = seed + 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Scores of some cells of a region, a cell being a stretch of a row within one block: one cell from
// each of `cells` equal parts of it, at a place that looks random but is always the same.
struct Sample {
  std::vector<float> scores;    // [cells * kBlock], of each cell the first sizes[cell]
  std::vector<int64_t> sizes;   // 0 where a score does not exist
};

inline Sample draw(const Pair& pair, const Region& region, int threads) {
  const int64_t per_row = (region.cols + kBlock - 1) / kBlock;
  const int64_t all = region.rows * per_row;
  const int64_t cells = std::max<int64_t>(1, std::min(kMostCells, all / kSparsest));
  Sample sample{std::vector<float>(cells * kBlock), std::vector<int64_t>(cells)};
  parallel_ieee(cells, threads, [&](int64_t i) {
    Scratch x;
    const double place = (double(i) + double(mix(i) >> 11) * 0x1p-53) / double(cells);
    const int64_t cell = std::min(all - 1, static_cast<int64_t>(place * double(all)));
    const int64_t col = cell % per_row * kBlock;
    const int64_t count = std::min(kBlock, region.cols - col);
    const float* scores =
        scores_of(pair, region.row + cell / per_row, region.col + col, count, x);
    if (scores == nullptr) return;
    std::copy(scores, scores + count, sample.scores.begin() + i * kBlock);
    sample.sizes[i] = count;
  });
  return sample;
}

// Where the score of rank k should be. The spread of the counts between cells says how far the
// sample may be off, whatever correlates within a cell.
inline Interval estimate(const Pair& pair, const Region& region, int64_t k, int threads) {
  const Sample sample = draw(pair, region, threads);
  std::vector<int32_t> keys;
  keys.reserve(sample.scores.size());
  for (size_t i = 0; i < sample.sizes.size(); ++i) {
    int32_t some[kBlock];
    pair.kernels->keys(&sample.scores[i * kBlock], sample.sizes[i], some);
    keys.insert(keys.end(), some, some + sample.sizes[i]);
  }
  const int64_t size = static_cast<int64_t>(keys.size());
  if (size == 0) return {-kNoBound, kNoBound};
  const double share = double(k) / double(region.size());
  const int64_t rank = std::clamp<int64_t>(std::llround(share * double(size)), 1, size);
  std::vector<int32_t> copy = keys;
  const float middle = float_of(kth_largest(copy.data(), size, rank));
  double total = 0, squares = 0;
  const double cells = double(sample.sizes.size());
  for (size_t i = 0; i < sample.sizes.size(); ++i) {
    const auto above = pair.kernels->count_above(&sample.scores[i * kBlock], sample.sizes[i], middle);
    total += double(above);
    squares += double(above) * double(above);
  }
  const double deviation = std::sqrt(std::max(0.0, squares - total * total / cells));
  const int64_t margin = std::llround(kDeviations * deviation) + 1;
  // Past the end of the sample there is no bound, unless the other one is the sample's extreme too:
  // then all that is near the threshold is one tie class.
  const auto at_rank = [&](int64_t wanted) {
    copy = keys;
    return float_of(kth_largest(copy.data(), size, std::clamp<int64_t>(wanted, 1, size)));
  };
  Interval interval{at_rank(rank + margin), at_rank(rank - margin)};
  if (interval.low < interval.high) {
    if (rank + margin > size) interval.low = -kNoBound;
    if (rank - margin < 1) interval.high = kNoBound;
  }
  return interval;
}

constexpr int kHalf = 16;  // bits of a digit
constexpr int64_t kDigits = int64_t{1} << kHalf;

// Calls visit(part, row, col, scores, count) for all segments, in equal parts, one thread each.
// Returns the first fault; a part ends at its first one.
template <typename Visit>
Fault each_part(const Pair& pair, const Region& region, int parts, const Visit& visit) {
  std::vector<Fault> faults(parts);
  parallel_ieee(parts, parts, [&](int64_t part) {
    Scratch x;
    const int64_t all = region.segments();
    const auto segment = [&](int64_t row, int64_t col, int64_t count) {
      const float* scores = scores_of(pair, row, col, count, x);
      if (scores == nullptr) {
        faults[part] = find_fault(pair, row, col, count, x);
        return false;
      }
      pair.kernels->keys(scores, count, x.keys);
      visit(part, row, col, x.keys, count);
      return true;
    };
    each_segment(region, all * part / parts, all * (part + 1) / parts, segment);
  });
  Fault fault;
  for (const Fault& found : faults) fault = first_of(fault, found);
  return fault;
}

// The score of rank k, by histograms of the upper and of the lower half of the keys: two passes,
// and nothing is held. 1 <= k <= size, and every score exists.
inline float exact_threshold(const Pair& pair, const Region& region, int64_t k, int threads) {
  std::vector<int64_t> counts(threads * kDigits);
  const auto locate = [&] {
    for (int64_t bin = kDigits - 1;; --bin) {
      int64_t found = 0;
      for (int part = 0; part < threads; ++part) found += counts[part * kDigits + bin];
      if (found >= k || bin == 0) return bin;
      k -= found;
    }
  };
  each_part(pair, region, threads,
            [&](int64_t part, int64_t, int64_t, const int32_t* keys, int64_t count) {
              int64_t* bins = &counts[part * kDigits];
              for (int64_t i = 0; i < count; ++i) ++bins[(keys[i] >> kHalf) + kDigits / 2];
            });
  const int64_t upper = locate() - kDigits / 2;
  std::fill(counts.begin(), counts.end(), 0);
  each_part(pair, region, threads,
            [&](int64_t part, int64_t, int64_t, const int32_t* keys, int64_t count) {
              int64_t* bins = &counts[part * kDigits];
              for (int64_t i = 0; i < count; ++i) {
                if ((keys[i] >> kHalf) == upper) ++bins[keys[i] & (kDigits - 1)];
              }
            });
  return float_of(static_cast<int32_t>(upper * kDigits + locate()));
}

}  // namespace tailor_fast::select
