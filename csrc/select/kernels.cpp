#include "select/kernels.h"

#include "select/isa.h"

namespace tailor_fast::select {

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> found = [] {
    std::vector<const Kernels*> kernels = {&baseline::kernels};
#if TAILOR_FAST_X86_KERNELS
    const auto has = [](auto... names) { return (names && ...); };
    const bool avx2 = has(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"),
                          __builtin_cpu_supports("bmi"), __builtin_cpu_supports("bmi2"));
    if (avx2) kernels.push_back(&avx2::kernels);
    if (avx2 && has(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                    __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"))) {
      kernels.push_back(&avx512::kernels);
    }
#endif
    return kernels;
  }();
  return found;
}

}  // namespace tailor_fast::select
