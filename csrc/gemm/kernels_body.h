// The kernels themselves, compiled once per instruction set by the files beside this one.
#include "common/simd.h"
#include "gemm/kernels.h"

TAILOR_FAST_KERNELS_BEGIN

// A tile's sums stay in registers: 24 of 32, or 12 of 16, which leaves room for one row of b.
#if defined(TAILOR_FAST_AVX512)
constexpr int64_t kTileRows = 12;
#else
constexpr int64_t kTileRows = 6;
#endif
constexpr int64_t kTileVectors = 2;
constexpr int64_t kTileCols = kTileVectors * kLanes;
// Products that are summed one after the other; a longer run rounds more than the libraries do.
constexpr int64_t kRun = 128;

constexpr int64_t kQuad = 4;
typedef float Quad __attribute__((vector_size(kQuad * 4)));

TAILOR_FAST_INLINE void copy_float(float* to, const char* from) {
  __builtin_memcpy(to, from, sizeof(float));
}

// to[d * panel + w] = from[w, d] of kQuad by kQuad.
TAILOR_FAST_INLINE void transpose_quad(const char* from, int64_t stride, int64_t panel, float* to) {
  Quad in[kQuad], half[kQuad];
  for (int64_t w = 0; w < kQuad; ++w) in[w] = load_vector<Quad>(from + w * stride * 4);
  for (int64_t w = 0; w < 2; ++w) {
    half[2 * w] = __builtin_shufflevector(in[w], in[w + 2], 0, 4, 1, 5);
    half[2 * w + 1] = __builtin_shufflevector(in[w], in[w + 2], 2, 6, 3, 7);
  }
  store_vector(to, __builtin_shufflevector(half[0], half[2], 0, 4, 1, 5));
  store_vector(to + panel, __builtin_shufflevector(half[0], half[2], 2, 6, 3, 7));
  store_vector(to + 2 * panel, __builtin_shufflevector(half[1], half[3], 0, 4, 1, 5));
  store_vector(to + 3 * panel, __builtin_shufflevector(half[1], half[3], 2, 6, 3, 7));
}

// One panel, of which `used` are there.
template <int64_t panel>
TAILOR_FAST_INLINE void pack_panel(const char* from, int64_t width_stride, int64_t depth_stride,
                                   int64_t used, int64_t depth, float* out) {
  int64_t d = 0;
  if (used == panel && width_stride == 1) {
    for (; d < depth; ++d) __builtin_memcpy(out + d * panel, from + d * depth_stride * 4, panel * 4);
  } else if (used == panel && depth_stride == 1) {
    for (; d + kQuad <= depth; d += kQuad) {
      int64_t w = 0;
      for (; w + kQuad <= panel; w += kQuad) {
        transpose_quad(from + (w * width_stride + d) * 4, width_stride, panel, out + d * panel + w);
      }
      for (; w < panel; ++w) {
        for (int64_t k = 0; k < kQuad; ++k) {
          copy_float(out + (d + k) * panel + w, from + (w * width_stride + d + k) * 4);
        }
      }
    }
  }
  for (; d < depth; ++d) {
    for (int64_t w = 0; w < used; ++w) {
      copy_float(out + d * panel + w, from + (w * width_stride + d * depth_stride) * 4);
    }
    for (int64_t w = used; w < panel; ++w) out[d * panel + w] = 0;
  }
}

template <int64_t panel>
TAILOR_FAST_INLINE void pack_panels(const char* from, int64_t width_stride, int64_t depth_stride,
                                    int64_t width, int64_t depth, float* out) {
  for (int64_t w = 0; w < width; w += panel) {
    const int64_t used = width - w < panel ? width - w : panel;
    pack_panel<panel>(from + w * width_stride * 4, width_stride, depth_stride, used, depth,
                      out + w * depth);
  }
}

static void pack(const void* from, int64_t width_stride, int64_t depth_stride, int64_t width,
                 int64_t depth, int64_t panel, float* out) {
  const auto* bytes = static_cast<const char*>(from);
  if (panel == kTileRows) {
    pack_panels<kTileRows>(bytes, width_stride, depth_stride, width, depth, out);
  } else {
    pack_panels<kTileCols>(bytes, width_stride, depth_stride, width, depth, out);
  }
}

static void tile(const float* a, const float* b, int64_t depth, float scale, bool accumulate,
                 void* to, int64_t stride, int64_t rows, int64_t cols) {
  auto* c = static_cast<char*>(to);
  if (accumulate) {  // on their way into the cache while the sums are formed
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(c + i * stride * 4, 1);
  }
  Floats totals[kTileRows][kTileVectors] = {};
  for (int64_t done = 0; done < depth; done += kRun) {
    Floats sums[kTileRows][kTileVectors] = {};
    const int64_t end = depth - done < kRun ? depth - done : kRun;
    for (int64_t d = 0; d < end; ++d, a += kTileRows, b += kTileCols) {
      Floats row[kTileVectors];
      for (int64_t v = 0; v < kTileVectors; ++v) row[v] = load_vector<Floats>(b + v * kLanes);
      for (int64_t i = 0; i < kTileRows; ++i) {
        const Floats head = Of<float>::all(a[i]);
        for (int64_t v = 0; v < kTileVectors; ++v) sums[i][v] = fused(head, row[v], sums[i][v]);
      }
    }
    for (int64_t i = 0; i < kTileRows; ++i) {
      for (int64_t v = 0; v < kTileVectors; ++v) totals[i][v] += sums[i][v];
    }
  }
  const Floats scales = Of<float>::all(scale);
  if (rows == kTileRows && cols == kTileCols) {
    for (int64_t i = 0; i < kTileRows; ++i) {
      for (int64_t v = 0; v < kTileVectors; ++v) {
        char* part = c + (i * stride + v * kLanes) * 4;
        const Floats before = accumulate ? load_vector<Floats>(part) : Floats{};
        store_vector(part, fused(scales, totals[i][v], before));
      }
    }
    return;
  }
  // Through memory, with no index that depends on the size: the sums would leave their registers.
  float whole[kTileRows * kTileCols];
  for (int64_t i = 0; i < kTileRows; ++i) {
    for (int64_t v = 0; v < kTileVectors; ++v) {
      store_vector(whole + i * kTileCols + v * kLanes, scales * totals[i][v]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      char* part = c + (i * stride + j) * 4;
      float value = 0;
      if (accumulate) __builtin_memcpy(&value, part, sizeof(value));
      value += whole[i * kTileCols + j];
      __builtin_memcpy(part, &value, sizeof(value));
    }
  }
}

extern const gemm::Kernels kGemm;
const gemm::Kernels kGemm = {kTileRows, kTileCols, &pack, &tile};

TAILOR_FAST_KERNELS_END
