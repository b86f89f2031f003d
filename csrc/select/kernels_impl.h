// Body of kernels_*.cpp, which set the instruction set and TAILOR_FAST_ISA and include this once.
// Nothing here may instantiate a template or an inline function of another header that other files
// use too: the linker could keep the copy that the oldest machine cannot run. The same holds
// for its first part, kernels_scores.h, which makes the scores; here they are compared and counted.
#include "select/kernels_scores.h"

namespace tailor_fast::select {
namespace TAILOR_FAST_ISA {
namespace {

struct Bits {
  uint64_t above, inside;
};

constexpr int64_t kGroup = 64;

#if defined(TAILOR_FAST_AVX512)
TF_INLINE Bits compare(const float* x, Interval interval) {
  const __m512 low = _mm512_set1_ps(interval.low), high = _mm512_set1_ps(interval.high);
  Bits bits{0, 0};
  for (int i = 0; i < 4; ++i) {
    const __m512 y = _mm512_loadu_ps(x + 16 * i);
    const uint64_t above = _mm512_cmp_ps_mask(y, high, _CMP_GT_OQ);
    const uint64_t reaches = _mm512_cmp_ps_mask(y, low, _CMP_GE_OQ);
    bits.above |= above << (16 * i);
    bits.inside |= (reaches & ~above) << (16 * i);
  }
  return bits;
}
TF_INLINE void spread(uint64_t ones, uint64_t twos, uint8_t* out) {
  const __m512i bytes = _mm512_mask_set1_epi8(_mm512_maskz_set1_epi8(ones, 1), twos, 2);
  _mm512_storeu_si512(out, bytes);
}
#elif defined(TAILOR_FAST_AVX2)
TF_INLINE Bits compare(const float* x, Interval interval) {
  const __m256 low = _mm256_set1_ps(interval.low), high = _mm256_set1_ps(interval.high);
  Bits bits{0, 0};
  for (int i = 0; i < 8; ++i) {
    const __m256 y = _mm256_loadu_ps(x + 8 * i);
    const uint64_t above = _mm256_movemask_ps(_mm256_cmp_ps(y, high, _CMP_GT_OQ));
    const uint64_t reaches = _mm256_movemask_ps(_mm256_cmp_ps(y, low, _CMP_GE_OQ));
    bits.above |= above << (8 * i);
    bits.inside |= (reaches & ~above) << (8 * i);
  }
  return bits;
}
TF_INLINE __m256i spread_half(uint32_t bits, int value) {
  const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                            0x0303030303030303);
  const __m256i picks = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), places);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, picks), picks);
  return _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(value)));
}
TF_INLINE void spread(uint64_t ones, uint64_t twos, uint8_t* out) {
  for (int i = 0; i < 2; ++i) {
    const __m256i bytes = _mm256_or_si256(spread_half(static_cast<uint32_t>(ones >> (32 * i)), 1),
                                          spread_half(static_cast<uint32_t>(twos >> (32 * i)), 2));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), bytes);
  }
}
#else
// Bytes of 0 or 1 to bits: the product moves byte i to bit 56 + i, and no two terms meet.
TF_INLINE uint64_t pack(const uint8_t* flags) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    bits |= (word<uint64_t>(flags, i) * uint64_t{0x0102040810204080}) >> 56 << (8 * i);
  }
  return bits;
}
TF_INLINE Bits compare(const float* x, Interval interval) {
  uint8_t above[kGroup], reaches[kGroup];
  for (int i = 0; i < kGroup; ++i) above[i] = x[i] > interval.high;
  for (int i = 0; i < kGroup; ++i) reaches[i] = x[i] >= interval.low;
  const uint64_t bits = pack(above);
  return {bits, pack(reaches) & ~bits};
}
TF_INLINE void spread(uint64_t ones, uint64_t twos, uint8_t* out) {
  for (int i = 0; i < kGroup; ++i) out[i] = (ones >> i & 1) | (twos >> i & 1) << 1;
}
#endif

TF_INLINE void take(Bits bits, const float* scores, Inside inside, int64_t index, uint8_t* mask,
                    Found& found, int64_t& held) {
  found.above += __builtin_popcountll(bits.above);
  found.inside += __builtin_popcountll(bits.inside);
  if (mask != nullptr) spread(bits.above, inside == Inside::kMark ? bits.inside : 0, mask);
  if (inside != Inside::kCollect) return;
  for (uint64_t left = bits.inside; left != 0; left &= left - 1, ++held) {
    const int place = __builtin_ctzll(left);
    found.scores[held] = scores[place];
    found.indices[held] = index + place;
  }
}

// What is collected has room for `count` more.
void classify(const float* scores, int64_t count, Interval interval, Inside inside, int64_t index,
              uint8_t* mask, Found& found) {
  int64_t held = found.inside;
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) {
    uint8_t* out = mask == nullptr ? nullptr : mask + i;
    take(compare(scores + i, interval), scores + i, inside, index + i, out, found, held);
  }
  if (i == count) return;
  float rest[kGroup] = {};
  uint8_t flags[kGroup];
  for (int64_t j = i; j < count; ++j) rest[j - i] = scores[j];
  Bits bits = compare(rest, interval);
  const uint64_t used = (uint64_t{1} << (count - i)) - 1;
  bits = {bits.above & used, bits.inside & used};
  take(bits, rest, inside, index + i, mask == nullptr ? nullptr : flags, found, held);
  if (mask != nullptr) __builtin_memcpy(mask + i, flags, count - i);
}

void keys(const float* scores, int64_t count, int32_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = as_bits(scores[i]), sign = bits >> 31;
    out[i] = ((bits & 0x7fffffff) ^ sign) - sign;
  }
}

int64_t count_above(const float* scores, int64_t count, float bound) {
  int32_t found = 0;  // count is at most a segment
  for (int64_t i = 0; i < count; ++i) found += scores[i] > bound;
  return found;
}

uint64_t read(const void* words, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum ^= word<uint64_t>(words, i);
  return sum;
}

#define TF_TERMS(Number)                                                                        \
  {                                                                                             \
    terms_of<Number, Terms::kScores>, terms_of<Number, Terms::kSalience>,                       \
        terms_of<Number, Terms::kBothSquare>, terms_of<Number, Terms::kBothAbsolute>,           \
        terms_of<Number, Terms::kBothWeight>, terms_of<Number, Terms::kSquare>,                 \
        terms_of<Number, Terms::kAbsolute>, terms_of<Number, Terms::kWeight>                    \
  }

#define TF_STRING_OF(name) #name
#define TF_STRING(name) TF_STRING_OF(name)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {TF_STRING(TAILOR_FAST_ISA),
                         {TF_TERMS(Float32), TF_TERMS(Bfloat16), TF_TERMS(Float16)},
                         block_sums,
                         scale,
                         standardise,
                         standardise_blocks,
                         classify,
                         keys,
                         count_above,
                         read};

}  // namespace TAILOR_FAST_ISA
}  // namespace tailor_fast::select
