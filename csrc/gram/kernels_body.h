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
TAILOR_FAST_INLINE void add_to_doubles(Floats from, double* to) {
  float parts[kLanes];
  store_vector(parts, from);
  for (int64_t half = 0; half < kLanes; half += kDoubleLanes) {
    const Doubles sum = load_vector<Doubles>(to + half) + Of<double>::widen(parts + half);
    store_vector(to + half, sum);
  }
}

// `count` rows at a time: their squares meet in float32, and `to` is read and written once. The
// hardware does not follow that many streams, each for no longer than a row, so `next`, the rows that
// come after these, are fetched ahead: 20 GB/s without that, 30 with it, where a plain read has 38.
template <Kind kind, int64_t count>
TAILOR_FAST_INLINE void add_some(const void* const* rows, const void* const* next, double* to,
                                 int64_t size) {
  constexpr int64_t bytes = gram::element_size(kind);
  constexpr int64_t line = 64 / bytes;
  const char *from[count], *ahead[count];
  for (int64_t k = 0; k < count; ++k) {
    from[k] = static_cast<const char*>(rows[k]);
    ahead[k] = static_cast<const char*>(next[k]);
  }
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    if (i % line == 0) {
      for (int64_t k = 0; k < count; ++k) __builtin_prefetch(ahead[k] + i * bytes);
    }
    Floats sum = {};
    for (int64_t k = 0; k < count; ++k) {
      const Floats x = widened<kind>(from[k] + i * bytes);
      sum = fused(x, x, sum);
    }
    add_to_doubles(sum, to + i);
  }
  if (i < size) {
    Floats sum = {};
    for (int64_t k = 0; k < count; ++k) {
      const Floats x = widened<kind>(from[k] + i * bytes, size - i);
      sum = fused(x, x, sum);
    }
    float parts[kLanes];
    store_vector(parts, sum);
    for (int64_t k = 0; i + k < size; ++k) to[i + k] += static_cast<double>(parts[k]);
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
