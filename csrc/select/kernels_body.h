// The kernels themselves, compiled once per instruction set by the files beside this one. The first
// part makes the scores; here they are compared and counted.
#include "select/kernels_scores.h"

TAILOR_FAST_KERNELS_BEGIN

namespace {

struct Bits {
  uint64_t above, inside;
};

constexpr int64_t kGroup = 64;  // scores, and bytes of a mask: a cache line

// `part(i)` gives vector i of a group of scores. "Above" is "not at most", which a NaN as bound
// makes true.
#if defined(TAILOR_FAST_AVX512)
template <typename Part>
TAILOR_FAST_INLINE Bits compare(const Part& part, Interval interval) {
  const __m512 low = _mm512_set1_ps(interval.low), high = _mm512_set1_ps(interval.high);
  __mmask16 above[4], reaches[4];
  for (int i = 0; i < 4; ++i) {
    const auto y = reinterpret_cast<__m512>(part(i));
    above[i] = _mm512_cmp_ps_mask(y, high, _CMP_NLE_UQ);
    reaches[i] = _mm512_cmp_ps_mask(y, low, _CMP_GE_OQ);
  }
  const auto joined = [](const __mmask16* m) {
    return _mm512_kunpackd(_mm512_kunpackw(m[3], m[2]), _mm512_kunpackw(m[1], m[0]));
  };
  const __mmask64 all = joined(above);
  return {all, _kandn_mask64(all, joined(reaches))};
}
TAILOR_FAST_INLINE void spread(uint64_t ones, uint64_t twos, bool streamed, uint8_t* out) {
  const __m512i bytes = _mm512_mask_set1_epi8(_mm512_maskz_set1_epi8(ones, 1), twos, 2);
  if (streamed) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), bytes);
  } else {
    _mm512_storeu_si512(out, bytes);
  }
}
#elif defined(TAILOR_FAST_AVX2)
template <typename Part>
TAILOR_FAST_INLINE Bits compare(const Part& part, Interval interval) {
  const __m256 low = _mm256_set1_ps(interval.low), high = _mm256_set1_ps(interval.high);
  Bits bits{0, 0};
  for (int i = 0; i < 8; ++i) {
    const auto y = reinterpret_cast<__m256>(part(i));
    const uint64_t above = _mm256_movemask_ps(_mm256_cmp_ps(y, high, _CMP_NLE_UQ));
    const uint64_t reaches = _mm256_movemask_ps(_mm256_cmp_ps(y, low, _CMP_GE_OQ));
    bits.above |= above << (8 * i);
    bits.inside |= (reaches & ~above) << (8 * i);
  }
  return bits;
}
TAILOR_FAST_INLINE __m256i spread_half(uint32_t bits, int value) {
  const __m256i places = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                            0x0303030303030303);
  const __m256i picks = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), places);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, picks), picks);
  return _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(value)));
}
TAILOR_FAST_INLINE void spread(uint64_t ones, uint64_t twos, bool streamed, uint8_t* out) {
  for (int i = 0; i < 2; ++i) {
    const __m256i bytes = _mm256_or_si256(spread_half(static_cast<uint32_t>(ones >> (32 * i)), 1),
                                          spread_half(static_cast<uint32_t>(twos >> (32 * i)), 2));
    auto* to = reinterpret_cast<__m256i*>(out + 32 * i);
    if (streamed) {
      _mm256_stream_si256(to, bytes);
    } else {
      _mm256_storeu_si256(to, bytes);
    }
  }
}
#else
// Bytes of 0 or 1 to bits: the product moves byte i to bit 56 + i, and no two terms meet.
TAILOR_FAST_INLINE uint64_t pack(const uint8_t* flags) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    bits |= (word<uint64_t>(flags, i) * uint64_t{0x0102040810204080}) >> 56 << (8 * i);
  }
  return bits;
}
template <typename Part>
TAILOR_FAST_INLINE Bits compare(const Part& part, Interval interval) {
  float x[kGroup];
  for (int i = 0; i < kGroup / kLanes; ++i) store_vector(x + i * kLanes, part(i));
  uint8_t above[kGroup], reaches[kGroup];
  for (int i = 0; i < kGroup; ++i) above[i] = !(x[i] <= interval.high);
  for (int i = 0; i < kGroup; ++i) reaches[i] = x[i] >= interval.low;
  const uint64_t bits = pack(above);
  return {bits, pack(reaches) & ~bits};
}
TAILOR_FAST_INLINE void spread(uint64_t ones, uint64_t twos, bool, uint8_t* out) {
  for (int i = 0; i < kGroup; ++i) out[i] = (ones >> i & 1) | (twos >> i & 1) << 1;
}
#endif
template <bool kMarks>
TAILOR_FAST_INLINE void take(Bits bits, Inside inside, Marks marks, Found& found) {
  if (kMarks) {
    spread(bits.above, inside == Inside::kMark ? bits.inside : 0, marks.streamed, marks.bytes);
  }
  found.above += __builtin_popcountll(bits.above);
  found.inside += __builtin_popcountll(bits.inside);
}

// `part(i)` gives the vector of scores from i on, `score(i)` one of them, `fetch(i)` asks for a
// group that comes soon. Groups with scores inside wait for the end of a segment to be collected:
// whether a group has one is a matter of chance, which a branch would lose time on.
template <bool kMarks, typename Part, typename Score, typename Fetch>
TAILOR_FAST_INLINE void classify_as(const Part& part, const Score& score, const Fetch& fetch,
                                    int64_t count, Interval interval, Inside inside, int64_t index,
                                    Marks marks, Found& result) {
  Found found = result;  // in registers: `marks` may alias what a reference names
  marks.streamed = marks.streamed && reinterpret_cast<uintptr_t>(marks.bytes) % kGroup == 0;
  struct Waiting {
    uint64_t inside;
    int64_t first;
  } queue[kSegment / kGroup];
  for (int64_t start = 0; start < count; start += kSegment) {
    const int64_t end = count - start < kSegment ? count : start + kSegment;
    int64_t held = found.inside, waiting = 0;
    const auto wait = [&](uint64_t some, int64_t first) __attribute__((always_inline)) {
      queue[waiting] = {some, first};
      waiting += some != 0;
    };
    int64_t i = start;
    for (; i + kGroup <= end; i += kGroup) {
      fetch(i);
      const auto of_group = [&](int j) __attribute__((always_inline)) {
        return part(i + j * kLanes);
      };
      const Bits bits = compare(of_group, interval);
      take<kMarks>(bits, inside, marks, found);
      wait(bits.inside, i);
      if (kMarks) marks.bytes += kGroup;
    }
    if (i < end) {
      float rest[kGroup] = {};
      uint8_t flags[kGroup];
      for (int64_t j = i; j < end; ++j) rest[j - i] = score(j);
      const auto of_rest = [&](int j) { return load_vector<Floats>(rest + j * kLanes); };
      const Bits all = compare(of_rest, interval);
      const uint64_t used = (uint64_t{1} << (end - i)) - 1;
      const Bits bits = {all.above & used, all.inside & used};
      take<kMarks>(bits, inside, {flags, false}, found);
      wait(bits.inside, i);
      if (kMarks) __builtin_memcpy(marks.bytes, flags, end - i);
    }
    if (inside != Inside::kCollect) continue;
    for (int64_t w = 0; w < waiting; ++w) {
      for (uint64_t left = queue[w].inside; left != 0; left &= left - 1, ++held) {
        const int64_t place = queue[w].first + __builtin_ctzll(left);
        found.scores[held] = score(place);
        found.indices[held] = index + place;
      }
    }
  }
  result = found;
}

void classify(const float* scores, int64_t count, Interval interval, Inside inside, int64_t index,
              Marks marks, Found& found) {
  const auto part = [=](int64_t i) { return load_vector<Floats>(scores + i); };
  const auto score = [=](int64_t i) { return scores[i]; };
  const auto fetch = [](int64_t) {};
  if (marks.bytes != nullptr) {
    classify_as<true>(part, score, fetch, count, interval, inside, index, marks, found);
  } else {
    classify_as<false>(part, score, fetch, count, interval, inside, index, marks, found);
  }
}

template <typename Number, Terms kTerms>
int32_t classify_terms_of(const void* base, const void* tuned, const void* column_weight,
                          int64_t count, Interval interval, Inside inside, int64_t index,
                          Marks marks, Found& found) {
  Largest seen;
  const auto term = [&](int64_t i, auto lane) __attribute__((always_inline)) {
    auto s = lane, v = lane;
    find_terms<Number, kTerms>(base, tuned, column_weight, i, seen, s, v);
    return has_salience(kTerms) ? s : v;
  };
  const auto part = [&](int64_t i) __attribute__((always_inline)) { return term(i, Floats{}); };
  const auto score = [&](int64_t i) __attribute__((always_inline)) { return term(i, 0.0f); };
  const auto fetch = [&](int64_t i) __attribute__((always_inline)) {
    fetch_ahead<Number, kGroup>(base, tuned, i);
  };
  classify_as<true>(part, score, fetch, count, interval, inside, index, marks, found);
  return seen.bits();
}

void keys(const float* scores, int64_t count, int32_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = as_bits(scores[i]), sign = bits >> 31;
    out[i] = ((bits & 0x7fffffff) ^ sign) - sign;
  }
}

int64_t count_above(const float* scores, int64_t count, float bound) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += kSegment) {
    const int64_t end = count - i < kSegment ? count : i + kSegment;
    int32_t some = 0;  // as wide as a score
    for (int64_t j = i; j < end; ++j) some += !(scores[j] <= bound);
    found += some;
  }
  return found;
}

uint64_t read(const void* words, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum ^= word<uint64_t>(words, i);
  return sum;
}

#define TF_ROW(function, Number, both)                                          \
  {                                                                             \
    function<Number, Terms::kScores>, function<Number, Terms::kSalience>,       \
        both(function, Number, kBothSquare), both(function, Number, kBothAbsolute), \
        both(function, Number, kBothWeight), function<Number, Terms::kSquare>,  \
        function<Number, Terms::kAbsolute>, function<Number, Terms::kWeight>    \
  }
// What `both` says of the terms with s and v: as the others, or none.
#define TF_SAME(function, Number, terms) function<Number, Terms::terms>
#define TF_NONE(function, Number, terms) nullptr
#define TF_TABLE(function, both)                                   \
  {                                                                \
    TF_ROW(function, Float32, both), TF_ROW(function, Bfloat16, both), \
        TF_ROW(function, Float16, both)                            \
  }

}  // namespace

extern const select::Kernels kSelect;
const select::Kernels kSelect = {TF_TABLE(terms_of, TF_SAME),
                                 block_sums,
                                 scale,
                                 standardise,
                                 TF_TABLE(block_scores_of, TF_SAME),
                                 classify,
                                 TF_TABLE(classify_terms_of, TF_NONE),
                                 keys,
                                 count_above,
                                 read};

TAILOR_FAST_KERNELS_END
