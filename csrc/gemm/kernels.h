// The kernels of `gemm` that exist once per instruction set, and the choice among them.
#pragma once

#include <cstdint>

namespace tailor_fast::gemm {

struct Kernels {
  int64_t rows;  // of a tile of the result
  int64_t cols;
  // Packs [width, depth] floats at any address into panels of `panel` of their `width` side by side,
  // zeros past the last one: out[(w / panel * depth + d) * panel + w % panel] = from[w, d]. Strides
  // are in floats; `panel` is `rows` or `cols`.
  void (*pack)(const void* from, int64_t width_stride, int64_t depth_stride, int64_t width,
               int64_t depth, int64_t panel, float* out);
  // to = scale a b, or to += it, for one panel of each; [rows, cols] of the tile are written.
  void (*tile)(const float* a, const float* b, int64_t depth, float scale, bool accumulate, void* to,
               int64_t stride, int64_t rows, int64_t cols);
};

// Those of the instruction set in use.
const Kernels& kernels();

}  // namespace tailor_fast::gemm

namespace tailor_fast::avx512 {
extern const gemm::Kernels kGemm;
}
namespace tailor_fast::avx2 {
extern const gemm::Kernels kGemm;
}
namespace tailor_fast::portable {
extern const gemm::Kernels kGemm;
}
