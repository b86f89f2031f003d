// The kernels themselves, compiled once per instruction set by the files beside this one.
#include "common/simd.h"
#include "gram/kernels.h"

TAILOR_FAST_KERNELS_BEGIN

using gram::Kind;

template <Kind kind>
TAILOR_FAST_INLINE Floats widened(const char* from) {
  if constexpr (kind == Kind::kFloat32) {
    return load_vector<Floats>(from);
  } else if constexpr (kind == Kind::kBFloat16) {
    const auto halves = load_vector<HalfWords>(from);
    return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
  } else {
    return half_to_float(load_vector<HalfWords>(from));
  }
}

// The same for fewer elements than a vector has.
template <Kind kind>
TAILOR_FAST_INLINE Floats widened(const char* from, int64_t count) {
  char whole[sizeof(Floats)] = {};
  __builtin_memcpy(whole, from, count * gram::element_size(kind));
  return widened<kind>(whole);
}

template <Kind kind>
TAILOR_FAST_INLINE void convert_kind(const char* from, float* to, int64_t size) {
  constexpr int64_t bytes = gram::element_size(kind);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store_vector(to + i, widened<kind>(from + i * bytes));
  if (i < size) {
    const Floats rest = widened<kind>(from + i * bytes, size - i);
    __builtin_memcpy(to + i, &rest, (size - i) * sizeof(float));
  }
}

static void convert(Kind kind, const void* from, float* to, int64_t size) {
  const auto* bytes = static_cast<const char*>(from);
  switch (kind) {
    case Kind::kFloat32:
      return convert_kind<Kind::kFloat32>(bytes, to, size);
    case Kind::kBFloat16:
      return convert_kind<Kind::kBFloat16>(bytes, to, size);
    case Kind::kFloat16:
      return convert_kind<Kind::kFloat16>(bytes, to, size);
  }
}

// to[i] += from[i], for one vector.
TAILOR_FAST_INLINE void add_to_doubles(const float* from, double* to) {
  for (int64_t half = 0; half < kLanes; half += kDoubleLanes) {
    const Doubles sum = load_vector<Doubles>(to + half) + Of<double>::widen(from + half);
    store_vector(to + half, sum);
  }
}

constexpr int64_t kPair = 2 * kLanes;  // elements of one step of the squares

// Two vectors of elements, in whatever order is cheapest; `in_order` undoes it.
template <Kind kind>
TAILOR_FAST_INLINE void widen_pair(const char* from, Floats* pair) {
  if constexpr (kind == Kind::kBFloat16) {  // a word holds two elements, the upper one in place
    const auto words = load_vector<Words>(from);
    pair[0] = reinterpret_cast<Floats>(words << 16);
    pair[1] = reinterpret_cast<Floats>(words & 0xffff0000u);
  } else {
    pair[0] = widened<kind>(from);
    pair[1] = widened<kind>(from + kLanes * gram::element_size(kind));
  }
}

template <Kind kind>
TAILOR_FAST_INLINE void in_order(const Floats* pair, float* out) {
  if constexpr (kind == Kind::kBFloat16) {
    for (int64_t i = 0; i < kLanes; ++i) {
      out[2 * i] = pair[0][i];
      out[2 * i + 1] = pair[1][i];
    }
  } else {
    store_vector(out, pair[0]);
    store_vector(out + kLanes, pair[1]);
  }
}

// `count` rows at a time: their squares meet in float32, and `to` is read and written once. The
// hardware does not follow that many streams, each for no longer than a row, so `next`, the rows that
// come after these, are fetched ahead.
template <Kind kind, int64_t count>
TAILOR_FAST_INLINE void add_some(const void* const* rows, const void* const* next, double* to,
                                 int64_t size) {
  constexpr int64_t bytes = gram::element_size(kind);
  const char *from[count], *ahead[count];
  for (int64_t k = 0; k < count; ++k) {
    from[k] = static_cast<const char*>(rows[k]);
    ahead[k] = static_cast<const char*>(next[k]);
  }
  int64_t i = 0;
  float parts[kPair];
  for (; i + kPair <= size; i += kPair) {
    Floats sums[2] = {};
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t line = 0; line < kPair * bytes; line += 64) {
        __builtin_prefetch(ahead[k] + i * bytes + line);
      }
      Floats pair[2];
      widen_pair<kind>(from[k] + i * bytes, pair);
      sums[0] = fused(pair[0], pair[0], sums[0]);
      sums[1] = fused(pair[1], pair[1], sums[1]);
    }
    in_order<kind>(sums, parts);
    add_to_doubles(parts, to + i);
    add_to_doubles(parts + kLanes, to + i + kLanes);
  }
  for (; i < size; i += kLanes) {  // what is left, by vectors with zeros behind
    const int64_t some = size - i < kLanes ? size - i : kLanes;
    Floats sum = {};
    for (int64_t k = 0; k < count; ++k) {
      const Floats x = widened<kind>(from[k] + i * bytes, some);
      sum = fused(x, x, sum);
    }
    store_vector(parts, sum);
    for (int64_t k = 0; k < some; ++k) to[i + k] += static_cast<double>(parts[k]);
  }
}

template <Kind kind>
TAILOR_FAST_INLINE void add_kind(const void* const* rows, int64_t count, double* to,
                                 int64_t size) {
  int64_t row = 0;
  for (; row + 8 <= count; row += 8) {
    const void* const* next = row + 16 <= count ? rows + row + 8 : rows + row;
    add_some<kind, 8>(rows + row, next, to, size);
  }
  for (; row < count; ++row) add_some<kind, 1>(rows + row, rows + row, to, size);
}

static void add_squares(Kind kind, const void* const* rows, int64_t count, double* to,
                        int64_t size) {
  switch (kind) {
    case Kind::kFloat32:
      return add_kind<Kind::kFloat32>(rows, count, to, size);
    case Kind::kBFloat16:
      return add_kind<Kind::kBFloat16>(rows, count, to, size);
    case Kind::kFloat16:
      return add_kind<Kind::kFloat16>(rows, count, to, size);
  }
}

extern const gram::Kernels kGram;
const gram::Kernels kGram = {&convert, &add_squares};

TAILOR_FAST_KERNELS_END
