// The inner loops of the `select` op, compiled once per instruction set.
//
// Each loop works on a stretch of one row that stays in the first-level cache. Every instruction
// set gives the same bits: the loops hold no operation that tailor_fast/ops/select/reference does
// not name, in the order that it states.
#pragma once

#include <cstdint>

namespace tailor_fast::select {

constexpr int64_t kBlock = 128;     // columns of a block
constexpr int64_t kSegment = 1024;  // most columns of a stretch, a multiple of kBlock
constexpr int32_t kInfinity = 0x7f800000;
constexpr double kSmallestDeviation = 0x1p-126;  // below it z = 0

enum class Dtype { kFloat32, kBfloat16, kFloat16 };
constexpr int kDtypes = 3;
inline int64_t width(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// Which terms a score has. kScores takes its first input for the score itself. The terms with s
// alone, with both and with v alone must keep this order: `has_salience` and the Python side count
// on it.
enum class Terms {
  kScores,
  kSalience,
  kBothSquare,  // v = (d * d) * c
  kBothAbsolute,
  kBothWeight,
  kSquare,
  kAbsolute,
  kWeight
};
constexpr int kTermKinds = 8;
constexpr bool has_salience(Terms terms) { return terms < Terms::kSquare; }
constexpr bool has_sensitivity(Terms terms) { return terms > Terms::kSalience; }
constexpr bool has_both(Terms terms) { return has_salience(terms) && has_sensitivity(terms); }

// z = (x - mean) * factor, of s and of v.
struct Affine {
  float mean[2];
  float factor[2];
};

// S1 and S2.
struct Sums {
  double one, two;
};

// How many scores were above an interval and inside it, and where the latter are collected, in
// linear order, with room for kSlack more. Plain pointers: see common/simd.h.
constexpr int64_t kSlack = 8;
struct Found {
  int64_t above = 0;
  int64_t inside = 0;
  float* scores = nullptr;
  int64_t* indices = nullptr;
};

// What to do with scores inside [low, high]: forget, mark by 2, or collect.
enum class Inside { kCount, kMark, kCollect };

// A bound may be NaN: nothing is inside if it is the low one, everything is above if the high one.
struct Interval {
  float low, high;
};

// Where the marks of a stretch go, if anywhere: 1 above the interval, else 0. Marks that are
// `streamed` are not read soon: lines that are written whole go past the caches.
struct Marks {
  uint8_t* bytes = nullptr;
  bool streamed = false;
};

struct Kernels {
  // Writes the terms of `count` elements; returns the largest magnitude of s and v as bits, so that
  // a result >= kInfinity says that one of them is not finite.
  using TermsOf = int32_t (*)(const void* base, const void* tuned, const void* column_weight,
                              int64_t count, float* s, float* v);
  TermsOf terms[kDtypes][kTermKinds];
  // S1 and S2 of each block of x, about one pivot; x is padded to whole blocks by it.
  void (*block_sums)(const float* x, int64_t blocks, float pivot, Sums* sums);
  // out = x * factor, or s * factors[0] + v * factors[1]; returns the largest magnitude as bits.
  int32_t (*scale)(const float* s, const float* v, int64_t count, const float* factors, float* out);
  // Sum of z of the terms, with one mean and factor for each term.
  void (*standardise)(const float* s, const float* v, int64_t count, const Affine& affine,
                      float* out);
  // From stored weights to scores with moments by block. s and v have room for whole blocks.
  // `weights` are those of s and of v; returns what `terms` returns.
  using BlockScores = int32_t (*)(const void* base, const void* tuned, const void* column_weight,
                                  int64_t count, const double* weights, float* s, float* v,
                                  float* out);
  BlockScores block_scores[kDtypes][kTermKinds];
  // Counts scores above and inside the interval, adds to `found`, and writes `marks`. `index` is
  // the linear index of scores[0]. What is collected begins at found.inside.
  void (*classify)(const float* scores, int64_t count, Interval interval, Inside inside,
                   int64_t index, Marks marks, Found& found);
  // The same for stored weights whose score is their one term as it is; null where there are two.
  // `marks` go somewhere. Returns what `terms` returns.
  using ClassifyTerms = int32_t (*)(const void* base, const void* tuned, const void* column_weight,
                                    int64_t count, Interval interval, Inside inside, int64_t index,
                                    Marks marks, Found& found);
  ClassifyTerms classify_terms[kDtypes][kTermKinds];
  // Keys of scores: int32 of the same order, -0 equal to +0.
  void (*keys)(const float* scores, int64_t count, int32_t* out);
  int64_t (*count_above)(const float* scores, int64_t count, float bound);
  uint64_t (*read)(const void* words, int64_t count);  // xor of 64-bit words: the probe
};

// Those of the instruction set in use.
const Kernels& kernels();

}  // namespace tailor_fast::select

namespace tailor_fast::avx512 {
extern const select::Kernels kSelect;
}
namespace tailor_fast::avx2 {
extern const select::Kernels kSelect;
}
namespace tailor_fast::portable {
extern const select::Kernels kSelect;
}
