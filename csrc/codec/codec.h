// The `codec` op on the CPU: where two arrays of words differ, as a bit mask and XOR words.
//
// Words are 1, 2, 4 or 8 bytes wide and never interpreted, so NaN payloads, -0 and subnormals pass
// through untouched. Work goes by blocks of kBlock words: each block owns whole bytes of the mask
// and one count, so blocks are independent and every thread count gives the same bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "common/bytes.h"
#include "common/parallel.h"

namespace tailor_fast::codec {

constexpr int64_t kBlock = 65536;  // words per entry of `counts`
constexpr int64_t kGroup = 64;     // words per 64-bit piece of the mask
constexpr uint64_t kFull = ~uint64_t{0};

inline int64_t block_count(int64_t size) { return (size + kBlock - 1) / kBlock; }

// First word of each block, and the number of all words at the end.
inline std::vector<int64_t> block_offsets(const void* counts, int64_t blocks) {
  std::vector<int64_t> offsets(blocks + 1, 0);
  for (int64_t b = 0; b < blocks; ++b) offsets[b + 1] = offsets[b] + load<int32_t>(counts, b);
  return offsets;
}

// Calls visit(first, count) for each group of a block; only the last one may have count < kGroup.
template <typename Visit>
inline void each_group(int64_t block, int64_t size, const Visit& visit) {
  const int64_t end = std::min(size, (block + 1) * kBlock);
  int64_t first = block * kBlock;
  for (; first + kGroup <= end; first += kGroup) visit(first, kGroup);
  if (first < end) visit(first, end - first);
}

// Calls visit(i) for each set bit i, lowest first.
template <typename Visit>
inline void each_set(uint64_t bits, const Visit& visit) {
  for (; bits != 0; bits &= bits - 1) visit(__builtin_ctzll(bits));
}

inline int64_t mask_bytes(int64_t count) { return (count + 7) / 8; }

// Mask bits of the group at `first`.
inline uint64_t mask_bits(const uint8_t* mask, int64_t first, int64_t count) {
  uint64_t bits = 0;
  std::memcpy(&bits, mask + first / 8, mask_bytes(count));
  return bits;
}

// Bytes of 0 or 1 to bits: the product moves byte i to bit 56 + i, and no two terms meet.
inline uint64_t pack8(const uint8_t* flags) {
  return (load<uint64_t>(flags, 0) * uint64_t{0x0102040810204080}) >> 56;
}

// Bits of the words in the group at `first` that differ; `allow` may be null.
template <typename T>
inline uint64_t differing(const void* base, const void* tuned, const uint8_t* allow, int64_t first,
                          int64_t count) {
  uint8_t flags[kGroup] = {};
  for (int64_t i = 0; i < count; ++i) {
    flags[i] = load<T>(base, first + i) != load<T>(tuned, first + i);
  }
  if (allow != nullptr) {
    for (int64_t i = 0; i < count; ++i) flags[i] &= static_cast<uint8_t>(allow[first + i] != 0);
  }
  uint64_t bits = 0;
  for (int j = 0; j < 8; ++j) bits |= pack8(flags + 8 * j) << (8 * j);
  return bits;
}

// out[i] = a[i] XOR b[i] for a whole group. Through a local array, so that it vectorises without
// knowing whether `out` overlaps an input (it may be `a`).
template <typename T>
inline void xor_group(const void* a, const void* b, void* out) {
  T words[kGroup];
  for (int64_t i = 0; i < kGroup; ++i) words[i] = static_cast<T>(load<T>(a, i) ^ load<T>(b, i));
  std::memcpy(out, words, sizeof(words));
}

// Writes `mask` [ceil(size/8)] and `counts` [block_count(size)]: the bits of the words that differ,
// lowest bit first, and how many per block. `allow` [size] or null: only where it is not 0.
// Returns the number of set bits.
template <typename T>
int64_t mark(const void* base, const void* tuned, const uint8_t* allow, int64_t size,
             uint8_t* mask, void* counts, int threads) {
  const int64_t blocks = block_count(size);
  parallel_for(blocks, threads, [=](int64_t b) {
    int32_t set = 0;
    each_group(b, size, [&](int64_t first, int64_t count) {
      const uint64_t bits = differing<T>(base, tuned, allow, first, count);
      std::memcpy(mask + first / 8, &bits, mask_bytes(count));
      set += __builtin_popcountll(bits);
    });
    store<int32_t>(counts, b, set);
  });
  return block_offsets(counts, blocks).back();
}

// Writes `words` [sum of counts]: base XOR tuned where the mask from `mark` is set, in order.
template <typename T>
void gather(const void* base, const void* tuned, int64_t size, const uint8_t* mask,
            const void* counts, void* words, int threads) {
  const int64_t blocks = block_count(size);
  const std::vector<int64_t> offsets = block_offsets(counts, blocks);
  parallel_for(blocks, threads, [&](int64_t b) {
    char* out = at<T>(words, offsets[b]);
    each_group(b, size, [&](int64_t first, int64_t count) {
      const uint64_t bits = mask_bits(mask, first, count);
      const char* left = at<T>(base, first);
      const char* right = at<T>(tuned, first);
      if (bits == kFull) {
        xor_group<T>(left, right, out);
        out += kGroup * sizeof(T);
        return;
      }
      each_set(bits, [&](int i) {
        store<T>(out, 0, static_cast<T>(load<T>(left, i) ^ load<T>(right, i)));
        out += sizeof(T);
      });
    });
  });
}

// Index of the first zero among words [begin, end), or -1.
template <typename T>
int64_t first_zero(const void* words, int64_t begin, int64_t end) {
  for (int64_t start = begin; start < end; start += kGroup) {
    const int64_t stop = std::min(end, start + kGroup);
    T zero = 0;  // as wide as a word, so that the loop vectorises
    for (int64_t i = start; i < stop; ++i) zero |= static_cast<T>(load<T>(words, i) == 0);
    if (zero == 0) continue;
    for (int64_t i = start; i < stop; ++i) {
      if (load<T>(words, i) == 0) return i;
    }
  }
  return -1;
}

// The first thing wrong with a patch. `kind` is a key of the messages on the Python side.
struct Fault {
  const char* kind;
  int64_t index;  // of the byte, block or word
  int64_t expected;
  int64_t got;
};

template <typename T>
std::optional<Fault> find_fault(int64_t size, const uint8_t* mask, const void* counts,
                                const void* words, int64_t word_count, int threads) {
  const int used = static_cast<int>(size % 8);
  if (used != 0 && mask[size / 8] >> used != 0) return Fault{"pad", size / 8, 0, mask[size / 8]};

  const int64_t blocks = block_count(size);
  std::vector<int32_t> found(blocks);
  parallel_for(blocks, threads, [&](int64_t b) {
    int32_t set = 0;
    each_group(b, size, [&](int64_t first, int64_t count) {
      set += __builtin_popcountll(mask_bits(mask, first, count));
    });
    found[b] = set;
  });
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t claimed = load<int32_t>(counts, b);
    if (claimed != found[b]) return Fault{"block", b, found[b], claimed};
  }
  const int64_t total = block_offsets(counts, blocks).back();
  if (total != word_count) return Fault{"words", 0, total, word_count};

  std::vector<int64_t> zeros(block_count(word_count));
  parallel_for(block_count(word_count), threads, [&](int64_t b) {
    zeros[b] = first_zero<T>(words, b * kBlock, std::min(word_count, (b + 1) * kBlock));
  });
  const auto zero = std::find_if(zeros.begin(), zeros.end(), [](int64_t i) { return i >= 0; });
  if (zero != zeros.end()) return Fault{"zero", *zero, 0, 0};
  return std::nullopt;
}

// Checks the whole patch, then XORs its words into `target` [size]. A patch at fault changes
// nothing. `mask` holds ceil(size/8) bytes and `counts` block_count(size) entries.
template <typename T>
std::optional<Fault> apply(void* target, int64_t size, const uint8_t* mask, const void* counts,
                           const void* words, int64_t word_count, int threads) {
  if (auto fault = find_fault<T>(size, mask, counts, words, word_count, threads)) return fault;
  const int64_t blocks = block_count(size);
  const std::vector<int64_t> offsets = block_offsets(counts, blocks);
  parallel_for(blocks, threads, [&](int64_t b) {
    const char* in = at<T>(words, offsets[b]);
    each_group(b, size, [&](int64_t first, int64_t count) {
      const uint64_t bits = mask_bits(mask, first, count);
      char* part = at<T>(target, first);
      if (bits == kFull) {
        xor_group<T>(part, in, part);
        in += kGroup * sizeof(T);
        return;
      }
      each_set(bits, [&](int i) {
        store<T>(part, i, static_cast<T>(load<T>(part, i) ^ load<T>(in, 0)));
        in += sizeof(T);
      });
    });
  });
  return std::nullopt;
}

}  // namespace tailor_fast::codec
