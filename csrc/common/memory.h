// Memory that is large: what the operating system may know of it, and buffers that are kept.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tailor_fast {

// Asks for huge pages under [address, address + bytes): a result of many megabytes is otherwise
// faulted in 4 KiB at a time, which takes longer than computing it. A hint: it may do nothing.
inline void use_huge_pages(void* address, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(address) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + bytes) & ~(kHuge - 1);
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
  static_cast<void>(address);
  static_cast<void>(bytes);
#endif
}

// Memory for vectors and packed matrices, aligned to a cache line. It keeps what it once had: fresh
// pages cost more than what is computed in them.
template <typename T>
class Buffer {
 public:
  // At least that many values, whatever they are; what was there before is lost.
  T* get(int64_t size) {
    if (size > size_) {
      size_ = 0;  // where the allocation fails nothing is left
      memory_.reset();
      memory_.reset(new T[size + kLine]);
      const auto address = reinterpret_cast<uintptr_t>(memory_.get());
      data_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
      size_ = size;
      use_huge_pages(data_, size * int64_t{sizeof(T)});
    }
    return data_;
  }
  T* zeros(int64_t size) {
    std::fill_n(get(size), size, T{});
    return data_;
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  std::unique_ptr<T[]> memory_;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace tailor_fast
