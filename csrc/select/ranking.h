// Scores by rank among many that are held: their digits are counted once, by all threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "select/keys.h"

namespace tailor_fast::select {

// Calls visit(first, count) for stretches of at most a segment of [begin, end).
template <typename Visit>
void each_stretch(int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t i = begin; i < end; i += kSegment) visit(i, std::min(kSegment, end - i));
}

class Ranking {
 public:
  // `scores` stay where they are, all of them between low and high.
  Ranking(const Kernels& kernels, const float* scores, int64_t count, Interval range, int threads)
      : kernels_(kernels), scores_(scores), count_(count),
        low_(key_of(range.low)), high_(key_of(range.high)) {
    const uint32_t span = digit_of(high_);
    shift_ = digit_shift(span);
    bins_ = (span >> shift_) + 1;
    const int64_t parts = std::clamp<int64_t>(count / kWorthwhile, 1, threads);
    std::vector<int32_t> counts(parts * bins_);
    parallel_for(parts, threads, [&](int64_t part) {
      int32_t* const mine = counts.data() + part * bins_;
      each_stretch(count * part / parts, count * (part + 1) / parts, [&](int64_t i, int64_t some) {
        int32_t keys[kSegment];
        kernels_.keys(scores_ + i, some, keys);
        for (int64_t j = 0; j < some; ++j) ++mine[digit_of(keys[j]) >> shift_];
      });
    });
    counts_.resize(bins_);
    for (int64_t i = 0; i < parts * bins_; ++i) counts_[i % bins_] += counts[i];
  }

  // The score of a rank, 1 the largest, and how many of its equals have that rank or a better one.
  struct Ranked {
    float score;
    int64_t ties;
  };
  Ranked find(int64_t rank) const {
    int64_t left = rank;
    const uint32_t bin = bin_of(counts_.data(), bins_, left);
    const int64_t lowest = low_ + (int64_t{bin} << shift_);
    const int64_t highest = std::min<int64_t>(lowest + (int64_t{1} << shift_) - 1, high_);
    const Collected found = collect({float_of(static_cast<int32_t>(lowest)),
                                     float_of(static_cast<int32_t>(highest))});
    std::vector<int32_t> keys(found.count);
    kernels_.keys(found.scores.get(), found.count, keys.data());
    const float score = float_of(kth_largest(keys.data(), found.count, left));
    return {score, left - kernels_.count_above(found.scores.get(), found.count, score)};
  }

  // Where the equals of a score stand: the place of the one of rank `tie`.
  int64_t place_of(Ranked ranked) const {
    return collect({ranked.score, ranked.score}).indices[ranked.ties - 1];
  }

 private:
  static constexpr int64_t kWorthwhile = 1 << 14;  // scores that are worth a thread

  struct Collected {
    std::unique_ptr<float[]> scores;
    std::unique_ptr<int64_t[]> indices;
    int64_t count;
  };

  // The scores inside an interval.
  Collected collect(Interval range) const {
    Found found;
    kernels_.classify(scores_, count_, range, Inside::kCount, 0, {}, found);
    Collected all{std::unique_ptr<float[]>(new float[found.inside + kSlack]),
                  std::unique_ptr<int64_t[]>(new int64_t[found.inside + kSlack]), found.inside};
    found = {0, 0, all.scores.get(), all.indices.get()};
    kernels_.classify(scores_, count_, range, Inside::kCollect, 0, {}, found);
    return all;
  }

  uint32_t digit_of(int32_t key) const {
    return static_cast<uint32_t>(key) - static_cast<uint32_t>(low_);
  }

  const Kernels& kernels_;
  const float* const scores_;
  const int64_t count_;
  const int32_t low_, high_;  // keys
  int shift_ = 0;
  uint32_t bins_ = 0;
  std::vector<int64_t> counts_;
};

}  // namespace tailor_fast::select
