// Floating point as IEEE 754 has it, whatever the calling thread has switched on.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace tailor_fast {

// Round to nearest, subnormals kept, no traps, for the life of the object. A library that was built
// with -ffast-math, or torch.set_flush_denormal, leaves a thread with flush-to-zero; worker threads
// inherit it, so each of them needs its own guard.
class IeeeFloats {
 public:
  IeeeFloats() : before_(get()) { set(kDefault); }
  ~IeeeFloats() { set(before_); }
  IeeeFloats(const IeeeFloats&) = delete;
  IeeeFloats& operator=(const IeeeFloats&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kDefault = 0x1F80;  // all exceptions masked
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t state) { _mm_setcsr(static_cast<uint32_t>(state)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kDefault = 0;
  static uint64_t get() {
    uint64_t state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void set(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state) : "memory"); }
#else
  static constexpr uint64_t kDefault = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif
  uint64_t before_;
};

}  // namespace tailor_fast
