// Bytes copied past the caches where the machine can.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace tailor_fast {

// memcpy whose target is not read soon: whole lines go to memory without being read first. Ends with
// no fence; `stream_fence` before another thread may read.
inline void stream_copy(uint8_t* target, const uint8_t* source, int64_t count) {
#if defined(__x86_64__)
  const int64_t head =
      std::min<int64_t>(count, static_cast<int64_t>(-reinterpret_cast<uintptr_t>(target) & 15));
  std::memcpy(target, source, head);
  int64_t i = head;
  for (; i + 16 <= count; i += 16) {
    const __m128i word = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), word);
  }
  std::memcpy(target + i, source + i, count - i);
#else
  std::memcpy(target, source, count);
#endif
}

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace tailor_fast
