// Keys of scores: int32 of the same order, and the one of a given rank among them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "select/kernels.h"

namespace tailor_fast::select {

constexpr float kNoBound = std::numeric_limits<float>::infinity();

inline int32_t key_of(float score) {
  int32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const int32_t sign = bits >> 31;
  return ((bits & 0x7fffffff) ^ sign) - sign;
}

// The float of a key; a key beyond infinity gives a NaN.
inline float float_of(int32_t key) {
  const bool negative = key < 0;
  const uint32_t size = negative ? uint32_t{0} - static_cast<uint32_t>(key) : key;
  const uint32_t bits = size | uint32_t{negative} << 31;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The next score down and up; past infinity it is a NaN, as `Interval` wants it.
inline float before(float score) { return float_of(key_of(score) - 1); }
inline float after(float score) { return float_of(key_of(score) + 1); }

// The digits that a threshold search takes are at most this wide: counts stay in the first cache.
constexpr int kDigitBits = 12;
constexpr int64_t kFew = 256;  // keys that are sorted rather than counted

// By how much to shift keys of a range so that kDigitBits are left.
inline int digit_shift(uint32_t span) {
  return span == 0 ? 0 : std::max(0, 32 - __builtin_clz(span) - kDigitBits);
}

// The bin that holds a rank, 1 the largest; the rank becomes that among the bin's own.
template <typename Count>
uint32_t bin_of(const Count* counts, uint32_t bins, int64_t& rank) {
  uint32_t bin = bins - 1;
  for (; bin > 0 && rank > counts[bin]; --bin) rank -= counts[bin];
  return bin;
}

// The key of a rank, 1 the largest, among `count` keys. Changes their order and number: each round
// counts a digit as wide as the keys still spread, and keeps the keys of one bin.
inline int32_t kth_largest(int32_t* keys, int64_t count, int64_t rank) {
  while (count > kFew) {
    int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
    for (int64_t i = 0; i < count; ++i) {
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    const uint32_t span = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    if (span == 0) return low;
    const int shift = digit_shift(span);
    const auto digit = [=](int32_t key) {
      return (static_cast<uint32_t>(key) - static_cast<uint32_t>(low)) >> shift;
    };
    int64_t counts[1 << kDigitBits] = {};
    for (int64_t i = 0; i < count; ++i) ++counts[digit(keys[i])];
    const uint32_t bin = bin_of(counts, (span >> shift) + 1, rank);
    if (shift == 0) return static_cast<int32_t>(static_cast<uint32_t>(low) + bin);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t key = keys[i];
      keys[kept] = key;
      kept += digit(key) == bin;
    }
    count = kept;
  }
  std::nth_element(keys, keys + rank - 1, keys + count, std::greater<int32_t>());
  return keys[rank - 1];
}

}  // namespace tailor_fast::select
