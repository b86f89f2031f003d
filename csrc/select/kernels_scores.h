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

template <typename T>
TAILOR_FAST_INLINE T word(const void* array, int64_t index) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(array) + index * int64_t{sizeof(T)}, sizeof(T));
  return value;
}

struct Float32 {
  using Word = float;
  TAILOR_FAST_INLINE float load(const void* array, int64_t i) { return word<float>(array, i); }
};

struct Bfloat16 {
  using Word = uint16_t;
  TAILOR_FAST_INLINE float load(const void* array, int64_t i) {
    return as_float(uint32_t{word<uint16_t>(array, i)} << 16);
  }
};

struct Float16 {
  using Word = uint16_t;
  // The exponent is rebiased by a product that is exact, for subnormals too. Without branches, so
  // that it vectorises where there is no instruction for it.
  TAILOR_FAST_INLINE float load(const void* array, int64_t i) {
    const uint32_t half = word<uint16_t>(array, i);
    const uint32_t shifted = (half & 0x7fff) << 13;
    uint32_t bits = static_cast<uint32_t>(as_bits(as_float(shifted) * 0x1p112f));
    bits |= shifted >= 0x0f800000 ? uint32_t{0x7f800000} : 0;  // infinity and NaN
    return as_float(bits | (half & 0x8000) << 16);
  }
};

TAILOR_FAST_INLINE int32_t magnitude(float value) { return as_bits(value) & 0x7fffffff; }
TAILOR_FAST_INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// Terms of `count` elements; returns the largest magnitude among them and `worst`, as bits.
template <typename Number, Terms kTerms>
TAILOR_FAST_INLINE int32_t add_terms(const void* base, const void* tuned,
                                     const void* column_weight, int64_t first, int64_t count,
                                     int32_t worst, float* __restrict s, float* __restrict v) {
  for (int64_t i = 0; i < count; ++i) {
    const float t = Number::load(tuned, first + i);
    if constexpr (kTerms == Terms::kScores) {
      s[i] = t;
      worst = larger(worst, magnitude(t));
    } else {
      const float d = t - Number::load(base, first + i);
      const float salience = __builtin_fabsf(d);
      worst = larger(worst, as_bits(salience));
      if constexpr (has_salience(kTerms)) s[i] = salience;
      if constexpr (has_sensitivity(kTerms)) {
        constexpr bool kSquares = kTerms == Terms::kBothSquare || kTerms == Terms::kSquare;
        constexpr bool kWeights = kTerms == Terms::kBothWeight || kTerms == Terms::kWeight;
        const float c = word<float>(column_weight, first + i);
        const float x = (kSquares ? d * d : kWeights ? t * t : salience) * c;
        worst = larger(worst, magnitude(x));
        v[i] = x;
      }
    }
  }
  return worst;
}

template <typename Number, Terms kTerms>
int32_t terms_of(const void* base, const void* tuned, const void* column_weight, int64_t count,
                 float* s, float* v) {
  return add_terms<Number, kTerms>(base, tuned, column_weight, 0, count, 0, s, v);
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

// A block of weights that come soon: while sums are made the hardware loses the streams.
template <typename Number>
TAILOR_FAST_INLINE void fetch_ahead(const void* base, const void* tuned, int64_t i) {
  constexpr int64_t kAhead = 2048, kLine = 64, kWidth = sizeof(typename Number::Word);
  for (int64_t j = i * kWidth + kAhead; j < (i + kBlock) * kWidth + kAhead; j += kLine) {
    __builtin_prefetch(static_cast<const char*>(base) + j, 0, 2);
    __builtin_prefetch(static_cast<const char*>(tuned) + j, 0, 2);
  }
}

// A block at a time: its terms are added up as soon as they are there, so that the loads of the
// next one overlap with sums.
template <typename Number, Terms kTerms>
int32_t block_scores_of(const void* base, const void* tuned, const void* column_weight,
                        int64_t count, const double* weights, float* s, float* v, float* out) {
  BlockSums of_s, of_v;
  Moments first, second;
  int32_t worst = 0;
  for (int64_t b = 0, i = 0; i < count; ++b, i += kBlock) {
    fetch_ahead<Number>(base, tuned, i);
    const int64_t some = count - i < kBlock ? count - i : kBlock;
    const auto add = [&](int64_t n) __attribute__((always_inline)) {
      return add_terms<Number, kTerms>(base, tuned, column_weight, i, n, worst, s + i, v + i);
    };
    worst = some == kBlock ? add(kBlock) : add(some);  // one of them has a constant length
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
  return worst;
}

}  // namespace

TAILOR_FAST_KERNELS_END
