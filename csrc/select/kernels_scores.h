// From stored weights to scores: the terms, their sums and the standardisation. First part of
// kernels_body.h, which alone includes this, once per instruction set.
#include "common/simd.h"
#include "select/kernels.h"

TAILOR_FAST_KERNELS_BEGIN
#if defined(TAILOR_FAST_AVX512) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")  // of plain loops; ends with the set itself
#endif

namespace {

using namespace select;

TAILOR_FAST_INLINE float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

TAILOR_FAST_INLINE int32_t as_bits(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// A word of an array, or a vector of them from `index` on.
template <typename T, typename Word = T>
TAILOR_FAST_INLINE T word(const void* array, int64_t index) {
  return load_vector<T>(static_cast<const char*>(array) + index * int64_t{sizeof(Word)});
}

typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

// Reads one weight, or a vector of them, as float32.
struct Float32 {
  using Word = float;
  TAILOR_FAST_INLINE void read(const void* array, int64_t i, float& x) {
    x = word<float>(array, i);
  }
  TAILOR_FAST_INLINE void read(const void* array, int64_t i, Floats& x) {
    x = word<Floats, Word>(array, i);
  }
};

struct Bfloat16 {
  using Word = uint16_t;
  TAILOR_FAST_INLINE void read(const void* array, int64_t i, float& x) {
    x = as_float(uint32_t{word<Word>(array, i)} << 16);
  }
  TAILOR_FAST_INLINE void read(const void* array, int64_t i, Floats& x) {
    const auto halves = word<HalfWords, Word>(array, i);
    x = reinterpret_cast<Floats>(widen(halves) << 16);
  }
};

struct Float16 {
  using Word = uint16_t;
  // One alone is the first of a vector of zeros.
  TAILOR_FAST_INLINE void read(const void* array, int64_t i, float& x) {
    HalfWords halves = {};
    halves[0] = word<Word>(array, i);
    x = half_to_float(halves)[0];
  }
  TAILOR_FAST_INLINE void read(const void* array, int64_t i, Floats& x) {
    x = half_to_float(word<HalfWords, Word>(array, i));
  }
};

TAILOR_FAST_INLINE float absolute(float value) { return __builtin_fabsf(value); }
TAILOR_FAST_INLINE Floats absolute(Floats value) {
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(value) & 0x7fffffffu);
}
TAILOR_FAST_INLINE int32_t magnitude(float value) { return as_bits(value) & 0x7fffffff; }
TAILOR_FAST_INLINE Ints magnitude(Floats value) {
  return reinterpret_cast<Ints>(absolute(value));
}
TAILOR_FAST_INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
TAILOR_FAST_INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// The largest magnitude of what it has seen, as bits. By lanes until it is asked for: a reduction of
// each short stretch would take as long as its scores.
class Largest {
 public:
  TAILOR_FAST_METHOD void see(float value) { one_ = larger(one_, magnitude(value)); }
  TAILOR_FAST_METHOD void see(Floats value) { lanes_ = larger(lanes_, magnitude(value)); }
  TAILOR_FAST_METHOD int32_t bits() const {
    int32_t all = one_;
    for (int64_t i = 0; i < kLanes; ++i) all = larger(all, lanes_[i]);
    return all;
  }

 private:
  Ints lanes_ = {};
  int32_t one_ = 0;
};

// In the place of `Largest` where sums show what is not finite.
struct Unseen {
  template <typename V>
  TAILOR_FAST_METHOD void see(V) {}
};

template <bool kFirst, typename A, typename B>
struct Choice {
  using Type = A;
};
template <typename A, typename B>
struct Choice<false, A, B> {
  using Type = B;
};

// s and v of one element, or of a vector of them from `i` on.
template <typename Number, Terms kTerms, typename Seen, typename V>
TAILOR_FAST_INLINE void find_terms(const void* base, const void* tuned, const void* column_weight,
                                   int64_t i, Seen& seen, V& s, V& v) {
  V t;
  Number::read(tuned, i, t);
  if constexpr (kTerms == Terms::kScores) {
    s = t;
    seen.see(s);
  } else {
    V b;
    Number::read(base, i, b);
    const V d = t - b;
    s = absolute(d);
    seen.see(s);
    if constexpr (has_sensitivity(kTerms)) {
      constexpr bool kSquares = kTerms == Terms::kBothSquare || kTerms == Terms::kSquare;
      constexpr bool kWeights = kTerms == Terms::kBothWeight || kTerms == Terms::kWeight;
      V c;
      Float32::read(column_weight, i, c);
      v = (kSquares ? d * d : kWeights ? t * t : s) * c;
      seen.see(v);
    }
  }
}

// Terms of `count` elements from `first` on.
template <typename Number, Terms kTerms, typename Seen>
TAILOR_FAST_INLINE void add_terms(const void* base, const void* tuned, const void* column_weight,
                                  int64_t first, int64_t count, Seen& seen, float* s, float* v) {
  const auto add = [&](int64_t i, auto lane) __attribute__((always_inline)) {
    auto of_s = lane, of_v = lane;
    find_terms<Number, kTerms>(base, tuned, column_weight, first + i, seen, of_s, of_v);
    if constexpr (has_salience(kTerms)) __builtin_memcpy(s + i, &of_s, sizeof(of_s));
    if constexpr (has_sensitivity(kTerms)) __builtin_memcpy(v + i, &of_v, sizeof(of_v));
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) add(i, Floats{});
  for (int64_t rest = count % kLanes; rest > 0; --rest, ++i) add(i, 0.0f);
}

// Returns the largest magnitude among the terms, as bits.
template <typename Number, Terms kTerms>
int32_t terms_of(const void* base, const void* tuned, const void* column_weight, int64_t count,
                 float* s, float* v) {
  Largest seen;
  add_terms<Number, kTerms>(base, tuned, column_weight, 0, count, seen, s, v);
  return seen.bits();
}

// One vector of float64 differences from a pivot.
TAILOR_FAST_INLINE Doubles differences(const float* x, float pivot) {
  return widen(load_vector<HalfFloats>(x) - pivot);
}
// e * e + f * f; both squares are exact, so that it is the same whether fused or not.
TAILOR_FAST_INLINE Doubles squares(Doubles e, Doubles f) { return fused(e, e, f * f); }

constexpr int64_t kVectors = kBlock / kDoubleLanes;

struct VectorSums {
  Doubles one, two;
};

// Vector `place` of the row of `count` that is left after folding kVectors of them by halves.
template <int place, int count>
TAILOR_FAST_INLINE VectorSums folded(const float* x, float pivot) {
  if constexpr (2 * count == kVectors) {
    const Doubles e = differences(x + place * kDoubleLanes, pivot);
    const Doubles f = differences(x + (place + count) * kDoubleLanes, pivot);
    return {e + f, squares(e, f)};
  } else {
    const VectorSums low = folded<place, 2 * count>(x, pivot);
    const VectorSums high = folded<place + count, 2 * count>(x, pivot);
    return {low.one + high.one, low.two + high.two};
  }
}

TAILOR_FAST_INLINE Sums sums_of_block(const float* x, float pivot) {
  const VectorSums sum = folded<0, 1>(x, pivot);
  return {sum_lanes(sum.one), sum_lanes(sum.two)};
}

void block_sums(const float* x, int64_t blocks, float pivot, Sums* sums) {
  for (int64_t b = 0; b < blocks; ++b) sums[b] = sums_of_block(x + b * kBlock, pivot);
}

int32_t scale(const float* s, const float* v, int64_t count, const float* factors,
              float* __restrict out) {
  int32_t worst = 0;
  if (s != nullptr && v != nullptr) {
    const float first = factors[0], second = factors[1];
    for (int64_t i = 0; i < count; ++i) {
      out[i] = s[i] * first + v[i] * second;
      worst = larger(worst, magnitude(out[i]));
    }
    return worst;
  }
  const float factor = s != nullptr ? factors[0] : factors[1];
  const float* x = s != nullptr ? s : v;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = x[i] * factor;
    worst = larger(worst, magnitude(out[i]));
  }
  return worst;
}

TAILOR_FAST_INLINE void shift_scale(const float* s, const float* v, int64_t count, float mean_s,
                                    float factor_s, float mean_v, float factor_v,
                                    float* __restrict out) {
  if (s != nullptr && v != nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = (s[i] - mean_s) * factor_s + (v[i] - mean_v) * factor_v;
    }
  } else if (s != nullptr) {
    for (int64_t i = 0; i < count; ++i) out[i] = (s[i] - mean_s) * factor_s;
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = (v[i] - mean_v) * factor_v;
  }
}

void standardise(const float* s, const float* v, int64_t count, const Affine& affine, float* out) {
  shift_scale(s, v, count, affine.mean[0], affine.factor[0], affine.mean[1], affine.factor[1], out);
}

constexpr int kBlocks = kSegment / kBlock;

struct Moments {
  float mean[kBlocks], factor[kBlocks];
};

// Sums of the blocks of a term, until they become its moments.
struct BlockSums {
  double one[kBlocks] = {}, two[kBlocks] = {}, pivot[kBlocks] = {}, size[kBlocks] = {};
};

// Pads a block of `count` elements and adds it up.
TAILOR_FAST_INLINE void set_block(BlockSums& blocks, int64_t block, float* x, int64_t count) {
  for (int64_t i = count; i < kBlock; ++i) x[i] = x[0];
  const Sums sums = sums_of_block(x, x[0]);
  blocks.one[block] = sums.one;
  blocks.two[block] = sums.two;
  blocks.pivot[block] = x[0];
  blocks.size[block] = count;
}

// Blocks that were not set get nothing of use.
TAILOR_FAST_INLINE void measure(const BlockSums& blocks, double weight, Moments& moments) {
  for (int b = 0; b < kBlocks; ++b) {
    const double one = blocks.one[b], size = blocks.size[b], q = one / size;
    const double deviation = __builtin_sqrt((blocks.two[b] - one * q) / (size - 1));
    const float factor = static_cast<float>(weight / deviation);
    moments.mean[b] = static_cast<float>(blocks.pivot[b] + q);
    moments.factor[b] = deviation >= kSmallestDeviation ? factor : 0.0f;
  }
}

// Whether every block has finite sums.
TAILOR_FAST_INLINE bool is_finite(const BlockSums& blocks) {
  bool finite = true;
  for (int b = 0; b < kBlocks; ++b) finite &= blocks.two[b] < __builtin_inf();
  return finite;
}

// `count` weights that come soon. The hardware follows the streams too closely: a core keeps enough
// lines on their way only if they are asked for a page ahead, while it computes.
template <typename Number, int64_t count>
TAILOR_FAST_INLINE void fetch_ahead(const void* base, const void* tuned, int64_t i) {
  constexpr int64_t kAhead = 4096, kLine = 64, kWidth = sizeof(typename Number::Word);
  const char* some[] = {static_cast<const char*>(base) + i * kWidth + kAhead,
                        static_cast<const char*>(tuned) + i * kWidth + kAhead};
  for (int64_t line = 0; line < count * kWidth; line += kLine) {
    for (const char* from : some) __builtin_prefetch(from + line);
  }
}

// A block at a time: its terms are added up as soon as they are there, so that the loads of the
// next one overlap with sums.
template <typename Number, Terms kTerms>
int32_t block_scores_of(const void* base, const void* tuned, const void* column_weight,
                        int64_t count, const double* weights, float* s, float* v, float* out) {
  // A sum of squares is finite only if every term is, so s is seen by its sums.
  constexpr bool kSummed = has_salience(kTerms);
  typename Choice<kSummed, Unseen, Largest>::Type seen;
  BlockSums of_s, of_v;
  Moments first, second;
  for (int64_t b = 0, i = 0; i < count; ++b, i += kBlock) {
    fetch_ahead<Number, kBlock>(base, tuned, i);
    const int64_t some = count - i < kBlock ? count - i : kBlock;
    const auto add = [&](int64_t n) __attribute__((always_inline)) {
      add_terms<Number, kTerms>(base, tuned, column_weight, i, n, seen, s + i, v + i);
    };
    some == kBlock ? add(kBlock) : add(some);  // one of them has a constant length
    if constexpr (has_salience(kTerms)) set_block(of_s, b, s + i, some);
    if constexpr (has_sensitivity(kTerms)) set_block(of_v, b, v + i, some);
  }
  if constexpr (has_salience(kTerms)) measure(of_s, weights[0], first);
  if constexpr (has_sensitivity(kTerms)) measure(of_v, weights[1], second);
  for (int64_t b = 0, i = 0; i < count; ++b, i += kBlock) {
    const int64_t some = count - i < kBlock ? count - i : kBlock;
    if constexpr (has_both(kTerms)) {
      shift_scale(s + i, v + i, some, first.mean[b], first.factor[b], second.mean[b],
                  second.factor[b], out + i);
    } else {
      const Moments& only = has_salience(kTerms) ? first : second;
      const float* x = has_salience(kTerms) ? s : v;
      shift_scale(x + i, nullptr, some, only.mean[b], only.factor[b], 0, 0, out + i);
    }
  }
  if constexpr (kSummed) {
    if (is_finite(of_s) && is_finite(of_v)) return 0;
    return terms_of<Number, kTerms>(base, tuned, column_weight, count, s, v);
  } else {
    return seen.bits();
  }
}

}  // namespace

TAILOR_FAST_KERNELS_END
