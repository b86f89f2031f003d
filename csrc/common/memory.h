// What the kernel of the operating system may know about memory that is about to be filled.
#pragma once

#include <cstdint>

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

}  // namespace tailor_fast
