// From stored weights to scores: the terms, their sums and the standardisation. First part of
// kernels_impl.h, which states the rules and alone includes this, once per instruction set.

namespace tailor_fast::select {
namespace TAILOR_FAST_ISA {
namespace {

#define TF_INLINE inline __attribute__((always_inline))

TF_INLINE float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

TF_INLINE int32_t as_bits(float value) {
  int32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename T>
TF_INLINE T word(const void* array, int64_t index) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(array) + index * int64_t{sizeof(T)}, sizeof(T));
  return value;
}

struct Float32 {
  static TF_INLINE float load(const void* array, int64_t i) { return word<float>(array, i); }
};

struct Bfloat16 {
  static TF_INLINE float load(const void* array, int64_t i) {
    return as_float(uint32_t{word<uint16_t>(array, i)} << 16);
  }
};

struct Float16 {
  // The exponent is rebiased by a product that is exact, for subnormals too. Without branches, so
  // that it vectorises where there is no instruction for it.
  static TF_INLINE float load(const void* array, int64_t i) {
    const uint32_t half = word<uint16_t>(array, i);
    const uint32_t shifted = (half & 0x7fff) << 13;
    uint32_t bits = static_cast<uint32_t>(as_bits(as_float(shifted) * 0x1p112f));
    bits |= shifted >= 0x0f800000 ? uint32_t{0x7f800000} : 0;  // infinity and NaN
    return as_float(bits | (half & 0x8000) << 16);
  }
};

TF_INLINE int32_t magnitude(float value) { return as_bits(value) & 0x7fffffff; }
TF_INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

template <typename Number, Terms kTerms>
int32_t terms_of(const void* base, const void* tuned, const void* column_weight, int64_t count,
                 float* __restrict s, float* __restrict v) {
  int32_t worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float t = Number::load(tuned, i);
    if constexpr (kTerms == Terms::kScores) {
      s[i] = t;
      worst = larger(worst, magnitude(t));
    } else {
      const float d = t - Number::load(base, i);
      const float salience = __builtin_fabsf(d);
      worst = larger(worst, as_bits(salience));
      if constexpr (has_salience(kTerms)) s[i] = salience;
      if constexpr (has_sensitivity(kTerms)) {
        constexpr bool kSquares = kTerms == Terms::kBothSquare || kTerms == Terms::kSquare;
        constexpr bool kWeights = kTerms == Terms::kBothWeight || kTerms == Terms::kWeight;
        const float c = word<float>(column_weight, i);
        const float x = (kSquares ? d * d : kWeights ? t * t : salience) * c;
        worst = larger(worst, magnitude(x));
        v[i] = x;
      }
    }
  }
  return worst;
}

// One vector of float64 differences from a pivot.
#if defined(TAILOR_FAST_AVX512)
using Doubles = __m512d;
TF_INLINE Doubles differences(const float* x, float pivot) {
  return _mm512_cvtps_pd(_mm256_sub_ps(_mm256_loadu_ps(x), _mm256_set1_ps(pivot)));
}
// e * e + f * f; both squares are exact, so the FMA is too.
TF_INLINE Doubles squares(Doubles e, Doubles f) { return _mm512_fmadd_pd(e, e, f * f); }
TF_INLINE double fold_lanes(Doubles x) {
  const __m256d y = _mm512_castpd512_pd256(x) + _mm512_extractf64x4_pd(x, 1);
  const __m128d z = _mm256_castpd256_pd128(y) + _mm256_extractf128_pd(y, 1);
  return z[0] + z[1];
}
#elif defined(TAILOR_FAST_AVX2)
using Doubles = __m256d;
TF_INLINE Doubles differences(const float* x, float pivot) {
  return _mm256_cvtps_pd(_mm_sub_ps(_mm_loadu_ps(x), _mm_set1_ps(pivot)));
}
TF_INLINE Doubles squares(Doubles e, Doubles f) { return _mm256_fmadd_pd(e, e, f * f); }
TF_INLINE double fold_lanes(Doubles x) {
  const __m128d z = _mm256_castpd256_pd128(x) + _mm256_extractf128_pd(x, 1);
  return z[0] + z[1];
}
#else
typedef double Doubles __attribute__((vector_size(16)));
TF_INLINE Doubles differences(const float* x, float pivot) {
  return Doubles{double{x[0] - pivot}, double{x[1] - pivot}};
}
TF_INLINE Doubles squares(Doubles e, Doubles f) { return e * e + f * f; }
TF_INLINE double fold_lanes(Doubles x) { return x[0] + x[1]; }
#endif

constexpr int kLanes = sizeof(Doubles) / sizeof(double);
constexpr int kVectors = kBlock / kLanes;

struct VectorSums {
  Doubles one, two;
};

// Vector `place` of the row of `count` that is left after folding kVectors of them by halves.
template <int place, int count>
TF_INLINE VectorSums folded(const float* x, float pivot) {
  if constexpr (2 * count == kVectors) {
    const Doubles e = differences(x + place * kLanes, pivot);
    const Doubles f = differences(x + (place + count) * kLanes, pivot);
    return {e + f, squares(e, f)};
  } else {
    const VectorSums low = folded<place, 2 * count>(x, pivot);
    const VectorSums high = folded<place + count, 2 * count>(x, pivot);
    return {low.one + high.one, low.two + high.two};
  }
}

TF_INLINE Sums sums_of_block(const float* x, float pivot) {
  const VectorSums sum = folded<0, 1>(x, pivot);
  return {fold_lanes(sum.one), fold_lanes(sum.two)};
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

TF_INLINE void shift_scale(const float* s, const float* v, int64_t count, float mean_s,
                           float factor_s, float mean_v, float factor_v, float* __restrict out) {
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

// Pads the last block and measures each; lanes beyond the last block hold nothing of use.
TF_INLINE void measure(float* x, int64_t count, double weight, Moments& moments) {
  double one[kBlocks] = {}, two[kBlocks] = {}, pivot[kBlocks] = {}, size[kBlocks] = {};
  for (int64_t b = 0, left = count; left > 0; ++b, left -= kBlock, x += kBlock) {
    for (int64_t i = left; i < kBlock; ++i) x[i] = x[0];
    const Sums sums = sums_of_block(x, x[0]);
    one[b] = sums.one;
    two[b] = sums.two;
    pivot[b] = x[0];
    size[b] = left < kBlock ? left : kBlock;
  }
  for (int b = 0; b < kBlocks; ++b) {
    const double q = one[b] / size[b];
    const double deviation = __builtin_sqrt((two[b] - one[b] * q) / (size[b] - 1));
    const float factor = static_cast<float>(weight / deviation);
    moments.mean[b] = static_cast<float>(pivot[b] + q);
    moments.factor[b] = deviation >= kSmallestDeviation ? factor : 0.0f;
  }
}

void standardise_blocks(float* s, float* v, int64_t count, const double* weights, float* out) {
  Moments first, second;
  if (s != nullptr) measure(s, count, weights[0], first);
  if (v != nullptr) measure(v, count, weights[1], second);
  for (int64_t b = 0, i = 0; i < count; ++b, i += kBlock) {
    const int64_t some = count - i < kBlock ? count - i : kBlock;
    if (s != nullptr && v != nullptr) {
      shift_scale(s + i, v + i, some, first.mean[b], first.factor[b], second.mean[b],
                  second.factor[b], out + i);
    } else {
      const Moments& only = s != nullptr ? first : second;
      shift_scale((s != nullptr ? s : v) + i, nullptr, some, only.mean[b], only.factor[b], 0, 0,
                  out + i);
    }
  }
}

}  // namespace

}  // namespace TAILOR_FAST_ISA
}  // namespace tailor_fast::select
