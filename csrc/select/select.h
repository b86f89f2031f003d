// Masks of the best scores of a region: one pass in the common case, proven by counts.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <vector>

#include "common/stream.h"
#include "select/threshold.h"

namespace tailor_fast::select {

constexpr int64_t kTaskSegments = 64;
constexpr int64_t kStreamBytes = int64_t{1} << 22;  // masks larger than a cache go past it

// What tests turn: results do not depend on it.
struct Tuning {
  int64_t stream_from = int64_t{1} << 20;  // elements from which a unit is streamed, not held
  int64_t budget_part = 16;                // candidates held: at most this part of the elements
  std::optional<Interval> bracket;         // instead of the estimate
};

struct Outcome {
  Fault fault;
  int64_t passes = 0;      // over the pair, but for the sample and the moments
  int64_t candidates = 0;  // collected in the last one
};

// Turns the marks 2 into 1 for the first `left` of them and into 0 for the others.
inline void settle(uint8_t* mask, int64_t count, int64_t& left) {
  uint8_t* const end = mask + count;
  for (; mask < end; ++mask) {
    mask = static_cast<uint8_t*>(std::memchr(mask, 2, end - mask));
    if (mask == nullptr) return;
    *mask = left > 0;
    left -= left > 0;
  }
}

// One thread's stretch of segments in a pass.
struct Task {
  Found found;
  std::vector<float> scores;
  std::vector<int64_t> indices;
  Fault fault;
};

class Streamed {
 public:
  Streamed(const Pair& pair, const Region& region, uint8_t* mask, const Tuning& tuning, int threads)
      : pair_(pair), region_(region), mask_(mask), tuning_(tuning), threads_(threads) {}

  Outcome select(int64_t k) {
    Interval interval{kNoBound, kNoBound};
    if (k > 0) {
      interval = tuning_.bracket ? *tuning_.bracket : estimate(pair_, region_, k, threads_);
    }
    Outcome outcome;
    bool proven = classify(interval, k, outcome);
    if (!outcome.fault && !proven) {
      const float score = exact_threshold(pair_, region_, k, threads_);
      outcome.passes += 2;
      interval = {score, score};
      proven = classify(interval, k, outcome);
    }
    if (outcome.fault) return outcome;
    if (!proven) throw std::runtime_error("select: the tensors changed while they were read");
    if (interval.low == interval.high) {
      mark_ties(k);
    } else {
      mark_best(k, outcome);
    }
    return outcome;
  }

  // Marks what is above a score and the first `ties` of its equals; returns how many of these.
  int64_t mark(float threshold, int64_t ties, Fault& fault) {
    Outcome outcome;
    classify({threshold, threshold}, 0, outcome);
    fault = outcome.fault;
    if (fault) return 0;
    int64_t equal = 0;
    for (const Task& task : tasks_) equal += task.found.inside;
    mark_ties(above_ + ties);
    return std::min(ties, equal);
  }

 private:
  uint8_t* mask_at(int64_t row, int64_t col) const { return mask_ + row * pair_.cols + col; }

  // One pass: marks what is above, and marks or collects what is inside. Returns whether the score
  // of rank k is proven to be inside, and everything inside was taken.
  bool classify(Interval interval, int64_t k, Outcome& outcome) {
    const bool collects = interval.low != interval.high;
    const int64_t all = region_.segments();
    const int64_t count = (all + kTaskSegments - 1) / kTaskSegments;
    std::vector<Task>(count).swap(tasks_);
    budget_ = region_.size() / tuning_.budget_part + kSegment;
    held_ = 0;
    overflowed_ = false;
    parallel_ieee(count, threads_, [&](int64_t i) {
      const int64_t end = std::min(all, (i + 1) * kTaskSegments);
      run(tasks_[i], i * kTaskSegments, end, interval, collects);
    });
    ++outcome.passes;
    int64_t above = 0, inside = 0;
    for (const Task& task : tasks_) {
      above += task.found.above;
      inside += task.found.inside;
      outcome.fault = first_of(outcome.fault, task.fault);
    }
    above_ = above;
    return above <= k && k <= above + inside && !overflowed_;
  }

  void run(Task& task, int64_t begin, int64_t end, Interval interval, bool collects) {
    Scratch x;
    const bool streams = region_.size() >= kStreamBytes;
    each_segment(region_, begin, end, [&](int64_t row, int64_t col, int64_t count) {
      const float* scores = scores_of(pair_, row, col, count, x);
      if (scores == nullptr) {
        task.fault = find_fault(pair_, row, col, count, x);
        return false;
      }
      const bool keeps = collects && !overflowed_.load(std::memory_order_relaxed);
      const Inside inside = keeps ? Inside::kCollect : collects ? Inside::kCount : Inside::kMark;
      uint8_t* mask = mask_at(row, col);
      Found found{0, 0, x.found_scores, x.found_indices};
      pair_.kernels->classify(scores, count, interval, inside, row * pair_.cols + col,
                              streams ? x.mask : mask, found);
      task.found.above += found.above;
      task.found.inside += found.inside;
      if (keeps && found.inside > 0) keep(task, found);
      if (streams) stream_copy(mask, x.mask, count);
      return true;
    });
    stream_fence();
  }

  // Appends what was collected, unless all tasks together hold too much.
  void keep(Task& task, const Found& found) {
    if (held_.fetch_add(found.inside, std::memory_order_relaxed) + found.inside > budget_) {
      overflowed_ = true;
      return;
    }
    task.scores.insert(task.scores.end(), found.scores, found.scores + found.inside);
    task.indices.insert(task.indices.end(), found.indices, found.indices + found.inside);
  }

  // All equals of the threshold carry the mark 2; the first ones stay.
  void mark_ties(int64_t k) {
    std::vector<int64_t> shares(tasks_.size());
    int64_t left = k - above_;
    for (size_t i = 0; i < tasks_.size(); ++i) {
      shares[i] = std::min(left, tasks_[i].found.inside);
      left -= shares[i];
    }
    const int64_t all = region_.segments();
    parallel_ieee(static_cast<int64_t>(tasks_.size()), threads_, [&](int64_t i) {
      if (tasks_[i].found.inside == 0) return;
      const int64_t end = std::min(all, (i + 1) * kTaskSegments);
      each_segment(region_, i * kTaskSegments, end, [&](int64_t row, int64_t col, int64_t count) {
        settle(mask_at(row, col), count, shares[i]);
        return true;
      });
    });
  }

  // Finds the threshold among the candidates, and marks those that reach it.
  void mark_best(int64_t k, Outcome& outcome) {
    std::vector<int32_t> keys;
    for (const Task& task : tasks_) outcome.candidates += task.found.inside;
    keys.resize(outcome.candidates);
    int32_t* out = keys.data();
    for (const Task& task : tasks_) {
      pair_.kernels->keys(task.scores.data(), task.found.inside, out);
      out += task.found.inside;
    }
    const int64_t rank = k - above_;
    if (rank == 0) return;
    const float threshold = float_of(kth_largest(keys.data(), outcome.candidates, rank));
    int64_t ties = rank;
    for (const Task& task : tasks_) {
      ties -= pair_.kernels->count_above(task.scores.data(), task.found.inside, threshold);
    }
    for (const Task& task : tasks_) {
      for (int64_t i = 0; i < task.found.inside; ++i) {
        const float score = task.scores[i];
        bool taken = score > threshold;
        if (score == threshold && ties > 0) {
          taken = true;
          --ties;
        }
        if (taken) mask_[task.indices[i]] = 1;
      }
    }
  }

  const Pair& pair_;
  const Region region_;
  uint8_t* const mask_;
  const Tuning& tuning_;
  const int threads_;
  std::vector<Task> tasks_;
  std::atomic<int64_t> held_{0};
  std::atomic<bool> overflowed_{false};
  int64_t budget_ = 0;
  int64_t above_ = 0;
};

// A unit that fits a cache: its scores are held, their keys counted, and nothing is estimated. One
// thread. Returns the first fault.
inline Fault select_held(const Pair& pair, const Region& region, int64_t k, uint8_t* mask,
                         std::vector<float>& scores, std::vector<int32_t>& keys) {
  Scratch x;
  Fault fault;
  const int64_t size = region.size();
  scores.resize(size);
  keys.resize(size);
  int64_t held = 0;
  each_segment(region, 0, region.segments(), [&](int64_t row, int64_t col, int64_t count) {
    const float* some = scores_of(pair, row, col, count, x);
    if (some == nullptr) {
      fault = find_fault(pair, row, col, count, x);
      return false;
    }
    std::copy(some, some + count, scores.begin() + held);
    held += count;
    return true;
  });
  if (fault) return fault;
  pair.kernels->keys(scores.data(), size, keys.data());
  const float threshold = k == 0 ? kNoBound : float_of(kth_largest(keys.data(), size, k));
  // Counting what lies above needs the marks first, so ties wait for a second look.
  Found found;
  held = 0;
  each_segment(region, 0, region.segments(), [&](int64_t row, int64_t col, int64_t count) {
    pair.kernels->classify(scores.data() + held, count, {threshold, threshold}, Inside::kMark, 0,
                           mask + row * pair.cols + col, found);
    held += count;
    return true;
  });
  int64_t left = k - found.above;
  each_segment(region, 0, region.segments(), [&](int64_t row, int64_t col, int64_t count) {
    settle(mask + row * pair.cols + col, count, left);
    return true;
  });
  return fault;
}

// How a tensor is cut into units of scope: the whole, blocks of columns, or rows. `k` of a unit, and
// of the last one, which may be narrower.
struct Units {
  int64_t rows, cols;  // of a unit
  int64_t k, last_k;
};

inline Outcome select_units(const Pair& pair, const Units& units, uint8_t* mask,
                            const Tuning& tuning, int threads) {
  const int64_t across = (pair.cols + units.cols - 1) / units.cols;
  const int64_t count = across * ((pair.rows + units.rows - 1) / units.rows);
  const auto region_of = [&](int64_t i) {
    const int64_t col = i % across * units.cols;
    return Region{i / across * units.rows, units.rows, col, std::min(units.cols, pair.cols - col)};
  };
  const auto k_of = [&](int64_t i) { return i + 1 == count ? units.last_k : units.k; };
  Outcome outcome;
  if (units.rows * units.cols >= tuning.stream_from) {
    for (int64_t i = 0; i < count; ++i) {
      Outcome unit = Streamed(pair, region_of(i), mask, tuning, threads).select(k_of(i));
      outcome.passes += unit.passes;
      outcome.candidates += unit.candidates;
      outcome.fault = first_of(outcome.fault, unit.fault);
    }
    return outcome;
  }
  const int64_t tasks = std::min<int64_t>(count, int64_t{threads} * 8);
  std::vector<Fault> faults(tasks);
  parallel_ieee(tasks, threads, [&](int64_t task) {
    std::vector<float> scores;
    std::vector<int32_t> keys;
    for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) {
      const Fault fault = select_held(pair, region_of(i), k_of(i), mask, scores, keys);
      faults[task] = first_of(faults[task], fault);
    }
  });
  for (const Fault& fault : faults) outcome.fault = first_of(outcome.fault, fault);
  outcome.passes = 1;
  return outcome;
}

}  // namespace tailor_fast::select
