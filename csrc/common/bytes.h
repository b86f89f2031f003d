// Raw memory as it comes from a tensor: a pointer that is only known to be aligned to one byte.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels store words and bit masks as they stand in little-endian memory"
#endif

namespace tailor_fast {

// `tensor.data_ptr()` as it arrives from Python.
inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Address of element `index` of an array of T.
template <typename T>
inline char* at(void* array, int64_t index) {
  return static_cast<char*>(array) + index * int64_t{sizeof(T)};
}

template <typename T>
inline const char* at(const void* array, int64_t index) {
  return static_cast<const char*>(array) + index * int64_t{sizeof(T)};
}

// A tensor that maps a file may start at any byte, where access through a T* is undefined; these
// copies compile to one instruction each, and loops over them still vectorise.
template <typename T>
inline T load(const void* array, int64_t index) {
  T value;
  std::memcpy(&value, at<T>(array, index), sizeof(T));
  return value;
}

template <typename T>
inline void store(void* array, int64_t index, T value) {
  std::memcpy(at<T>(array, index), &value, sizeof(T));
}

}  // namespace tailor_fast
