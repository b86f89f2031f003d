// Histogram of the digits of a pair's keys, and its keys inside an interval: a search's round.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "select/threshold.h"

namespace tailor_fast::select {

// Which keys a round counts and collects: see KeyInterval in radix.py.
struct KeyInterval {
  std::optional<int64_t> prefix;  // of the keys whose lower half is counted; none: all upper halves
  int64_t low, high;              // keys collected
};

struct Counted {
  Fault fault;
  int64_t found = 0;  // keys collected
  int64_t above = 0;  // keys above the interval
};

// Adds to `counts` [kDigits] and writes the keys collected, in linear order, to `keys`, which has
// room for every key of the pair.
inline Counted count_keys(const Pair& pair, const KeyInterval& interval, int64_t* counts,
                          int32_t* keys, int threads) {
  struct Part {
    std::vector<int64_t> counts;
    int32_t* keys = nullptr;
    int64_t found = 0, above = 0;
  };
  std::vector<Part> parts(threads);
  const auto add = [&](int64_t part, int64_t row, int64_t col, const int32_t* some, int64_t count) {
    Part& p = parts[part];
    if (p.counts.empty()) {
      p.counts.resize(kDigits);
      p.keys = keys + row * pair.cols + col;  // where its own keys would be
    }
    for (int64_t i = 0; i < count; ++i) {
      const int32_t key = some[i];
      p.keys[p.found] = key;
      p.found += key >= interval.low && key <= interval.high;
      p.above += key > interval.high;
    }
    int64_t* bins = p.counts.data();
    if (!interval.prefix) {
      for (int64_t i = 0; i < count; ++i) ++bins[(some[i] >> kHalf) + kDigits / 2];
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      if ((some[i] >> kHalf) == *interval.prefix) ++bins[some[i] & (kDigits - 1)];
    }
  };
  Counted counted;
  counted.fault = each_part(pair, {0, pair.rows, 0, pair.cols}, threads, add);
  if (counted.fault) return counted;
  for (const Part& part : parts) {
    if (part.counts.empty()) continue;
    for (int64_t i = 0; i < kDigits; ++i) counts[i] += part.counts[i];
    std::copy(part.keys, part.keys + part.found, keys + counted.found);
    counted.found += part.found;
    counted.above += part.above;
  }
  return counted;
}

}  // namespace tailor_fast::select
