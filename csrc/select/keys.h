// Keys of scores: int32 of the same order, and the one of a given rank among them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "select/kernels.h"

namespace tailor_fast::select {

// The float of a key. Keys beyond infinity, which no number has, become infinity.
inline float float_of(int32_t key) {
  const bool negative = key < 0;
  const uint32_t size = negative ? uint32_t{0} - static_cast<uint32_t>(key) : key;
  const uint32_t bits = std::min<uint32_t>(size, kInfinity) | uint32_t{negative} << 31;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// The digits that a threshold search takes are at most this wide: counts stay in the first cache.
constexpr int kDigitBits = 12;
constexpr int64_t kFew = 256;  // keys that are sorted rather than counted

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
    const int shift = std::max(0, 32 - __builtin_clz(span) - kDigitBits);
    const auto digit = [=](int32_t key) {
      return (static_cast<uint32_t>(key) - static_cast<uint32_t>(low)) >> shift;
    };
    int64_t counts[1 << kDigitBits] = {};
    for (int64_t i = 0; i < count; ++i) ++counts[digit(keys[i])];
    uint32_t bin = span >> shift;
    for (; rank > counts[bin]; --bin) rank -= counts[bin];
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
