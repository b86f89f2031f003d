// Masks of the best scores of a region: one pass in the common case, proven by counts.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
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
  std::optional<Bracket> bracket;          // instead of the estimate
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

// A stretch of segments in a pass, and its part of the candidates.
struct Task {
  int64_t above = 0, inside = 0;
  int64_t first_candidate = 0;
  Fault fault;
};

// What one thread needs for a task, from outside of the parallel region.
struct Worker {
  Scratch scratch;
  float scores[kTaskSegments * kSegment + kSlack];
  int64_t indices[kTaskSegments * kSegment + kSlack];
};

class Streamed {
 public:
  Streamed(const Pair& pair, const Region& region, uint8_t* mask, const Tuning& tuning, int threads)
      : pair_(pair),
        region_(region),
        mask_(mask),
        tuning_(tuning),
        threads_(threads),
        tasks_((region.segments() + kTaskSegments - 1) / kTaskSegments),
        workers_(new Worker[used_threads(task_count(), threads)]) {}

  Outcome select(int64_t k) {
    Outcome outcome;
    Bracket bracket = kNothing;
    if (k > 0) bracket = tuning_.bracket ? *tuning_.bracket : estimate(pair_, region_, k, threads_);
    budget_ = region_.size() / tuning_.budget_part + kSegment;
    scores_.reset(new float[budget_]);
    indices_.reset(new int64_t[budget_]);
    if (pass(bracket, Inside::kCollect, k, outcome)) {
      if (!outcome.fault) mark_best(bracket, k, outcome);
      return outcome;
    }
    const float score = exact_threshold(pair_, region_, k, threads_);
    outcome.passes += 2;
    const Bracket equals = {{score, 0}, {score, kEveryIndex}};
    if (!pass(equals, Inside::kMark, k, outcome)) {
      throw std::runtime_error("select: the tensors changed while they were read");
    }
    mark_ties(k);
    return outcome;
  }

  // Marks what is above a score and the first `ties` of its equals; returns how many of these.
  int64_t mark(float threshold, int64_t ties, Fault& fault) {
    Outcome outcome;
    pass({{threshold, 0}, {threshold, kEveryIndex}}, Inside::kMark, 0, outcome);
    fault = outcome.fault;
    if (fault) return 0;
    mark_ties(above_ + ties);
    return std::min(ties, inside_);
  }

 private:
  int64_t task_count() const { return static_cast<int64_t>(tasks_.size()); }
  uint8_t* mask_at(int64_t row, int64_t col) const { return mask_ + row * pair_.cols + col; }

  template <typename Visit>
  void each_segment_of(int64_t task, const Visit& visit) const {
    const int64_t end = std::min(region_.segments(), (task + 1) * kTaskSegments);
    each_segment(region_, task * kTaskSegments, end, visit);
  }

  // One pass: marks what is above the bracket, and marks or collects what is inside. Returns
  // whether there is a fault, or else the element of rank k is proven to be inside and all that
  // was taken.
  bool pass(const Bracket& bracket, Inside inside, int64_t k, Outcome& outcome) {
    held_ = 0;
    // Every worker has a stretch of tasks to itself, so that no two first touch the same page of
    // the mask; one that is done helps the others.
    const int64_t workers = used_threads(task_count(), threads_);
    std::vector<std::atomic<int64_t>> next(workers);
    for (int64_t i = 0; i < workers; ++i) next[i] = task_count() * i / workers;
    parallel_ieee(workers, threads_, [&](int64_t worker) {
      for (int64_t j = 0; j < workers; ++j) {
        const int64_t whose = (worker + j) % workers;
        const int64_t end = task_count() * (whose + 1) / workers;
        for (int64_t i; (i = next[whose].fetch_add(1, std::memory_order_relaxed)) < end;) {
          run(i, bracket, inside, workers_[worker]);
        }
      }
      stream_fence();
    });
    ++outcome.passes;
    above_ = inside_ = 0;
    for (const Task& task : tasks_) {
      above_ += task.above;
      inside_ += task.inside;
      outcome.fault = first_of(outcome.fault, task.fault);
    }
    const bool taken = inside != Inside::kCollect || held_ <= budget_;
    return outcome.fault || (above_ <= k && k <= above_ + inside_ && taken);
  }

  void run(int64_t number, const Bracket& bracket, Inside inside, Worker& worker) {
    Task& task = tasks_[number];
    task = {};
    const bool streamed = region_.size() >= kStreamBytes;
    if (held_.load(std::memory_order_relaxed) > budget_) inside = Inside::kCount;
    Found found{0, 0, worker.scores, worker.indices};
    each_segment_of(number, [&](int64_t row, int64_t col, int64_t count) {
      const int64_t index = row * pair_.cols + col;
      const Interval interval = interval_of(bracket, index, count);
      const Marks marks{mask_at(row, col), streamed};
      if (classify(pair_, row, col, count, interval, inside, marks, worker.scratch, found)) {
        return true;
      }
      task.fault = find_fault(pair_, row, col, count, worker.scratch);
      return false;
    });
    task.above = found.above;
    task.inside = found.inside;
    if (inside == Inside::kCollect) keep(task, found);
  }

  // Takes what a task collected, unless all tasks together hold too much.
  void keep(Task& task, const Found& found) {
    task.first_candidate = held_.fetch_add(found.inside, std::memory_order_relaxed);
    if (task.first_candidate + found.inside > budget_) return;
    std::copy(found.scores, found.scores + found.inside, scores_.get() + task.first_candidate);
    std::copy(found.indices, found.indices + found.inside, indices_.get() + task.first_candidate);
  }

  // How many of `left` places go to each task, in order, if it has `wanted(task)` claims.
  template <typename Wanted>
  std::vector<int64_t> share_out(int64_t left, const Wanted& wanted) const {
    std::vector<int64_t> shares(tasks_.size());
    for (size_t i = 0; i < tasks_.size(); ++i) {
      shares[i] = std::min(left, wanted(tasks_[i]));
      left -= shares[i];
    }
    return shares;
  }

  // All equals of the threshold carry the mark 2; the first ones stay.
  void mark_ties(int64_t k) {
    auto shares = share_out(k - above_, [](const Task& task) { return task.inside; });
    parallel_for(task_count(), threads_, [&](int64_t i) {
      if (tasks_[i].inside == 0) return;
      each_segment_of(i, [&](int64_t row, int64_t col, int64_t count) {
        settle(mask_at(row, col), count, shares[i]);
        return true;
      });
    });
  }

  // Finds the threshold among the candidates, and marks those that reach it.
  void mark_best(const Bracket& bracket, int64_t k, Outcome& outcome) {
    outcome.candidates = inside_;
    const int64_t rank = k - above_;
    if (rank == 0) return;
    const Kernels& kernels = *pair_.kernels;
    const Interval range{bracket.last.score, bracket.first.score};
    const Ranking ranking(kernels, scores_.get(), inside_, range, threads_);
    const float threshold = ranking.find(rank).score;
    const auto above = [&](const Task& task, float bound) {
      return kernels.count_above(scores_.get() + task.first_candidate, task.inside, bound);
    };
    int64_t ties = rank;
    for (const Task& task : tasks_) ties -= above(task, threshold);
    auto shares = share_out(ties, [&](const Task& task) {
      return above(task, before(threshold)) - above(task, threshold);
    });
    parallel_for(task_count(), threads_, [&](int64_t i) {
      const int64_t end = tasks_[i].first_candidate + tasks_[i].inside;
      uint8_t nowhere;
      for (int64_t j = tasks_[i].first_candidate; j < end; ++j) {
        constexpr int64_t kAhead = 16;  // marks were streamed: each is a miss of the caches
        if (j + kAhead < end) __builtin_prefetch(mask_ + indices_[j + kAhead], 1);
        const bool tie = scores_[j] == threshold && shares[i] > 0;
        shares[i] -= tie;
        // A store without a branch: which way it would go is a matter of chance.
        *(tie || scores_[j] > threshold ? mask_ + indices_[j] : &nowhere) = 1;
      }
    });
  }

  const Pair& pair_;
  const Region region_;
  uint8_t* const mask_;
  const Tuning& tuning_;
  const int threads_;
  std::vector<Task> tasks_;
  std::unique_ptr<Worker[]> workers_;
  // The candidates of all tasks, each task's together and in linear order.
  std::unique_ptr<float[]> scores_;
  std::unique_ptr<int64_t[]> indices_;
  std::atomic<int64_t> held_{0};
  int64_t budget_ = 0;
  int64_t above_ = 0, inside_ = 0;
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
                           {mask + row * pair.cols + col}, found);
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

// How a tensor is cut into units of scope: the whole, blocks of columns, or rows. `k` of a unit,
// and of the last one, which may be narrower.
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
