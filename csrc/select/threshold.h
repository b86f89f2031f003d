// Where the element of rank k is: an estimate from a sample, or its exact score.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "select/ranking.h"
#include "select/scoring.h"

namespace tailor_fast::select {

constexpr int64_t kMostCells = 2048;  // cells of kBlock elements in a sample
constexpr int64_t kSparsest = 16;     // a sample is at most this part of a region
constexpr double kDeviations = 4;     // half width of the estimate; a miss costs passes, no more

// A cut in the order of selection, which is by score downwards and then by linear index: before it
// lie the larger scores, and the equal ones below `index`.
struct Place {
  float score;
  int64_t index;
};

// What lies before `first` is kept, what lies after `last` is not; between them it is not decided.
struct Bracket {
  Place first, last;
};

constexpr int64_t kEveryIndex = std::numeric_limits<int64_t>::max();
constexpr Bracket kNothing = {{kNoBound, 0}, {kNoBound, 0}};

// The bracket for elements [index, index + count), where only the score counts: a cut within them
// moves to their first or last one, so that more is left undecided.
inline Interval interval_of(const Bracket& bracket, int64_t index, int64_t count) {
  const Place &first = bracket.first, &last = bracket.last;
  return {index < last.index ? last.score : after(last.score),
          index + count <= first.index ? before(first.score) : first.score};
}

// Bits that look random and depend on `seed` alone (splitmix64).
inline uint64_t mix(uint64_t seed) {
  uint64_t z = seed + 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Scores of some cells of a region, a cell being a stretch of a row within one block: one cell from
// each of `cells` equal parts of it, at a place that looks random but is always the same. So the
// order of the sample is that of linear indices.
struct Sample {
  int64_t cells;
  std::unique_ptr<float[]> scores;  // [cells * kBlock], -infinity where there is none
  std::vector<int64_t> starts;      // linear index of each cell
  int64_t size;                     // scores that there are
  int64_t index_of(int64_t place) const {
    return starts[place / kBlock] + place % kBlock;
  }
};

inline Sample draw(const Pair& pair, const Region& region, int threads) {
  const int64_t per_row = (region.cols + kBlock - 1) / kBlock;
  const int64_t all = region.rows * per_row;
  const int64_t cells = std::max<int64_t>(1, std::min(kMostCells, all / kSparsest));
  Sample sample{cells, std::unique_ptr<float[]>(new float[cells * kBlock]),
                std::vector<int64_t>(cells), 0};
  const auto row_and_col = [&](int64_t i) {
    const double place = (double(i) + double(mix(i) >> 11) * 0x1p-53) / double(cells);
    const int64_t cell = std::min(all - 1, static_cast<int64_t>(place * double(all)));
    return std::make_pair(region.row + cell / per_row, cell % per_row * kBlock);
  };
  std::atomic<int64_t> size{0};
  const int64_t parts = std::min<int64_t>(cells, int64_t{threads} * 4);
  parallel_ieee(parts, threads, [&](int64_t part) {
    Scratch x;
    int64_t found = 0;
    const int64_t end = cells * (part + 1) / parts;
    for (int64_t i = cells * part / parts; i < end; ++i) {
      constexpr int64_t kAhead = 4;  // cells are far apart: each is a miss of the caches
      if (i + kAhead < end) {
        const auto [row, col] = row_and_col(i + kAhead);
        prefetch(pair, row, region.col + col, std::min(kBlock, region.cols - col));
      }
      const auto [row, col] = row_and_col(i);
      const int64_t count = std::min(kBlock, region.cols - col);
      const float* scores = scores_of(pair, row, region.col + col, count, x);
      sample.starts[i] = row * pair.cols + region.col + col;
      float* const out = sample.scores.get() + i * kBlock;
      const int64_t some = scores == nullptr ? 0 : count;
      std::copy(scores, scores + some, out);
      std::fill(out + some, out + kBlock, -kNoBound);
      found += some;
    }
    size += found;
  });
  sample.size = size;
  return sample;
}

// Standard deviation of how many elements of a sample lie before one of them. Neighbouring cells
// come from neighbouring parts of the region: half the square of their difference is the variance
// within a part, whatever correlates within a cell or changes along the tensor.
inline double deviation_of(const Kernels& kernels, const Sample& sample, float score,
                           int64_t place) {
  double squares = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < sample.cells; ++i) {
    const float bound = (i + 1) * kBlock <= place ? before(score) : score;
    const int64_t count = kernels.count_above(sample.scores.get() + i * kBlock, kBlock, bound);
    if (i > 0) squares += double(count - last) * double(count - last);
    last = count;
  }
  return std::sqrt(squares / 2);
}

// Where the element of rank k should be.
inline Bracket estimate(const Pair& pair, const Region& region, int64_t k, int threads) {
  constexpr Bracket kAll = {{kNoBound, 0}, {-kNoBound, kEveryIndex}};
  const Sample sample = draw(pair, region, threads);
  if (sample.size == 0) return kAll;
  const Ranking ranking(*pair.kernels, sample.scores.get(), sample.cells * kBlock,
                        {-kNoBound, kNoBound}, threads);
  const double share = double(k) / double(region.size());
  const int64_t rank =
      std::clamp<int64_t>(std::llround(share * double(sample.size)), 1, sample.size);
  const Ranking::Ranked middle = ranking.find(rank);
  const double deviation =
      deviation_of(*pair.kernels, sample, middle.score, ranking.place_of(middle));
  const int64_t margin = std::llround(kDeviations * deviation) + 1;
  const auto place = [&](int64_t wanted) {
    const Ranking::Ranked ranked = ranking.find(wanted);
    return Place{ranked.score, sample.index_of(ranking.place_of(ranked)) + 1};
  };
  return {rank - margin < 1 ? kAll.first : place(rank - margin),
          rank + margin > sample.size ? kAll.last : place(rank + margin)};
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
