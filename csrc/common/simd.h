// Vectors of one instruction set. Included once per translation unit, by a file that is named after
// the instruction set and has defined one of TAILOR_FAST_AVX512, TAILOR_FAST_AVX2 or
// TAILOR_FAST_PORTABLE; kernels stand between TAILOR_FAST_KERNELS_BEGIN and TAILOR_FAST_KERNELS_END.
//
// One build then runs on every CPU: the kernels of an instruction set are compiled for it, and
// nothing else in the extension is. So they use no standard library: an inline function of it would
// be compiled for that set too, and the linker could choose that copy for all callers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(TAILOR_FAST_AVX512) || defined(TAILOR_FAST_AVX2)
#include <immintrin.h>
#endif

// Vectors never cross a call: everything here is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(TAILOR_FAST_AVX512)
#define TAILOR_FAST_ISA avx512
#define TAILOR_FAST_TARGET "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c,bmi,bmi2,popcnt"
#define TAILOR_FAST_LANES 16
#elif defined(TAILOR_FAST_AVX2)
#define TAILOR_FAST_ISA avx2
#define TAILOR_FAST_TARGET "avx2,fma,f16c,bmi,bmi2,popcnt"
#define TAILOR_FAST_LANES 8
#else
#define TAILOR_FAST_ISA portable
#define TAILOR_FAST_LANES 4
#endif

#define TAILOR_FAST_PRAGMA(text) _Pragma(#text)
#if !defined(TAILOR_FAST_TARGET)
#define TAILOR_FAST_TARGET_BEGIN
#define TAILOR_FAST_TARGET_END
#elif defined(__clang__)
#define TAILOR_FAST_ATTRIBUTE(set) \
  TAILOR_FAST_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define TAILOR_FAST_TARGET_BEGIN TAILOR_FAST_ATTRIBUTE(TAILOR_FAST_TARGET)
#define TAILOR_FAST_TARGET_END _Pragma("clang attribute pop")
#else
#define TAILOR_FAST_OPTION(set) TAILOR_FAST_PRAGMA(GCC target(set))
#define TAILOR_FAST_TARGET_BEGIN \
  _Pragma("GCC push_options") TAILOR_FAST_OPTION(TAILOR_FAST_TARGET)
#define TAILOR_FAST_TARGET_END _Pragma("GCC pop_options")
#endif

#define TAILOR_FAST_KERNELS_BEGIN \
  TAILOR_FAST_TARGET_BEGIN namespace tailor_fast { namespace TAILOR_FAST_ISA {
#define TAILOR_FAST_KERNELS_END \
  } }                           \
  TAILOR_FAST_TARGET_END

#define TAILOR_FAST_METHOD inline __attribute__((always_inline))
#define TAILOR_FAST_INLINE static TAILOR_FAST_METHOD

TAILOR_FAST_KERNELS_BEGIN

constexpr int64_t kLanes = TAILOR_FAST_LANES;       // of Floats
constexpr int64_t kDoubleLanes = kLanes / 2;        // of Doubles

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef double Doubles __attribute__((vector_size(kLanes * 4)));
typedef float HalfFloats __attribute__((vector_size(kLanes * 2)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfWords __attribute__((vector_size(kLanes * 2)));

template <typename V>
TAILOR_FAST_INLINE V load_vector(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V>
TAILOR_FAST_INLINE void store_vector(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

// a * b + c, rounded once where the instruction set has it.
TAILOR_FAST_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(TAILOR_FAST_AVX512)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(a, b, c));
#elif defined(TAILOR_FAST_AVX2)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps(a, b, c));
#else
  return a * b + c;
#endif
}

TAILOR_FAST_INLINE Doubles fused(Doubles a, Doubles b, Doubles c) {
#if defined(TAILOR_FAST_AVX512)
  return reinterpret_cast<Doubles>(_mm512_fmadd_pd(a, b, c));
#elif defined(TAILOR_FAST_AVX2)
  return reinterpret_cast<Doubles>(_mm256_fmadd_pd(a, b, c));
#else
  return a * b + c;
#endif
}

// float32 to float64, exactly.
TAILOR_FAST_INLINE Doubles widen(HalfFloats floats) {
#if defined(TAILOR_FAST_AVX512)  // GCC 13 converts by quarters and puts them together
  return reinterpret_cast<Doubles>(
      _mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(floats)));
#else
  return __builtin_convertvector(floats, Doubles);
#endif
}

// Unsigned 16 bits to 32.
TAILOR_FAST_INLINE Words widen(HalfWords halves) {
#if defined(TAILOR_FAST_AVX512)  // as above
  return reinterpret_cast<Words>(
      _mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}

// The vectors of a real type, and how float32 in memory becomes one.
template <typename Real>
struct Of;

template <>
struct Of<float> {
  typedef Floats Vector;
  static constexpr int64_t kWidth = kLanes;
  TAILOR_FAST_INLINE Vector widen(const void* from) { return load_vector<Floats>(from); }
  TAILOR_FAST_INLINE Vector all(float value) { return value - Floats{}; }
};

template <>
struct Of<double> {
  typedef Doubles Vector;
  static constexpr int64_t kWidth = kDoubleLanes;
  TAILOR_FAST_INLINE Vector widen(const void* from) {
    return TAILOR_FAST_ISA::widen(load_vector<HalfFloats>(from));
  }
  TAILOR_FAST_INLINE Vector all(double value) { return value - Doubles{}; }
};

// float16 to float32, exactly.
TAILOR_FAST_INLINE Floats half_to_float(HalfWords halves) {
#if defined(TAILOR_FAST_AVX512)
  return reinterpret_cast<Floats>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(halves)));
#elif defined(TAILOR_FAST_AVX2)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(halves)));
#else
  const Words words = __builtin_convertvector(halves, Words);
  const Words size = words & 0x7fffu, sign = (words & 0x8000u) << 16;
  // The exponent's bias differs by 112. Subnormals of float16 are normal in float32: one bit is put
  // before the mantissa and taken away again by an exact subtraction.
  const Words normal = (size << 13) + (uint32_t{112} << 23);
  const Words special = (size << 13) + (uint32_t{224} << 23);  // infinity and NaN
  const Words one = Words{} + (uint32_t{113} << 23);
  const Floats small =
      reinterpret_cast<Floats>((size << 13) + one) - reinterpret_cast<Floats>(one);
  const Words is_special = reinterpret_cast<Words>(size >= 0x7c00u);
  const Words is_small = reinterpret_cast<Words>(size < 0x0400u);
  const Words finite = (is_small & reinterpret_cast<Words>(small)) | (~is_small & normal);
  return reinterpret_cast<Floats>(sign | (is_special & special) | (~is_special & finite));
#endif
}

// Sum of all lanes, by halves.
template <typename V>
TAILOR_FAST_INLINE auto sum_lanes(V value) {
  constexpr int lanes = sizeof(V) / sizeof(value[0]);
  decltype(value[0] + value[0]) parts[lanes];
  for (int i = 0; i < lanes; ++i) parts[i] = value[i];
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  }
  return parts[0];
}

// The same sums in the same order, without a way through memory.
#if defined(TAILOR_FAST_AVX512) || defined(TAILOR_FAST_AVX2)
TAILOR_FAST_INLINE float sum_half(__m256 value) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
TAILOR_FAST_INLINE double sum_half(__m256d value) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(value), _mm256_extractf128_pd(value, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
#endif
#if defined(TAILOR_FAST_AVX512)
TAILOR_FAST_INLINE float sum_lanes(Floats value) {
  const auto all = reinterpret_cast<__m512>(value);
  return sum_half(_mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, all, 0),
                                _mm512_maskz_extractf32x8_ps(0xff, all, 1)));
}
TAILOR_FAST_INLINE double sum_lanes(Doubles value) {
  const auto all = reinterpret_cast<__m512d>(value);
  return sum_half(_mm256_add_pd(_mm512_maskz_extractf64x4_pd(0xf, all, 0),
                                _mm512_maskz_extractf64x4_pd(0xf, all, 1)));
}
#elif defined(TAILOR_FAST_AVX2)
TAILOR_FAST_INLINE float sum_lanes(Floats value) {
  return sum_half(reinterpret_cast<__m256>(value));
}
TAILOR_FAST_INLINE double sum_lanes(Doubles value) {
  return sum_half(reinterpret_cast<__m256d>(value));
}
#endif

TAILOR_FAST_KERNELS_END
