// The kernels of `gram` that exist once per instruction set, and the choice among them.
#pragma once

#include <cstdint>

namespace tailor_fast::gram {

// What an element of the inputs is; the values are those that Python passes.
enum class Kind : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t element_size(Kind kind) { return kind == Kind::kFloat32 ? 4 : 2; }

struct Kernels {
  // to[i] = from[i] as float32; `from` may stand at any address.
  void (*convert)(Kind kind, const void* from, float* to, int64_t size);
  // to[i] += the squares of rows[0..count)[i]: by eights in float32, and those sums in float64.
  void (*add_squares)(Kind kind, const void* const* rows, int64_t count, double* to, int64_t size);
};

// Those of the instruction set in use.
const Kernels& kernels();

}  // namespace tailor_fast::gram

namespace tailor_fast::avx512 {
extern const gram::Kernels kGram;
}
namespace tailor_fast::avx2 {
extern const gram::Kernels kGram;
}
namespace tailor_fast::portable {
extern const gram::Kernels kGram;
}
