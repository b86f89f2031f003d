// Blocks of both matrices are packed, then multiplied tile by tile: Goto & van de Geijn, ACM TOMS 34,
// 2008; the loops around the tile are those of BLIS (Van Zee & van de Geijn, ACM TOMS 41, 2015).
#include "gemm/gemm.h"

#include <pybind11/pybind11.h>

#include <algorithm>

#include "common/bytes.h"
#include "common/cpu.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "gemm/kernels.h"
#include "modules.h"

namespace py = pybind11;

namespace tailor_fast {
namespace gemm {

const Kernels& kernels() { return TAILOR_FAST_KERNELS(kGemm); }

namespace {

// A panel of b, 48 KiB, nearly stays in the first cache. Of 2 x 2048^3 flops on two Zen 5 cores: 380
// GF/s at a depth of 256, 403 at 384, 407 at 512, where products of few columns lose a tenth.
constexpr int64_t kDepth = 384;
constexpr int64_t kSide = 4096;     // rows and columns that are packed at a time: 6 MiB each
constexpr int64_t kTaskRows = 240;  // of one task: its part of a, 360 KiB, stays in the second cache
constexpr int64_t kTaskCols = 512;

constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }

// Both sides, packed; kept from call to call, for fresh pages cost as much as a small product.
struct Packed {
  Buffer<float> a, b;
};

// What is packed: rows of `a` or columns of `b` from `first` on, `size` of them.
struct Side {
  const void* from;
  int64_t stride, depth_stride, size, panel;
  float* to;

  static constexpr int64_t kPanels = 16;  // of one task
  int64_t tasks() const { return ceil_div(size, kPanels * panel); }
  void pack(int64_t task, int64_t depth) const {
    const int64_t first = task * kPanels * panel;
    kernels().pack(at<float>(from, first * stride), stride, depth_stride,
                   std::min(kPanels * panel, size - first), depth, panel, to + first * depth);
  }
};

// One block of the result, at the place (row, col) of it.
struct Block {
  const Product& product;
  const Side &a, &b;
  int64_t row, col, depth;
  bool accumulate;

  void multiply(int64_t row_task, int64_t col_task, int64_t task_rows) const {
    const int64_t i_end = std::min(a.size, (row_task + 1) * task_rows);
    const int64_t j_end = std::min(b.size, (col_task + 1) * kTaskCols);
    for (int64_t j = col_task * kTaskCols; j < j_end; j += b.panel) {
      for (int64_t i = row_task * task_rows; i < i_end; i += a.panel) {
        if (product.lower && row + i + a.panel <= col + j) continue;
        kernels().tile(a.to + i * depth, b.to + j * depth, depth, product.scale, accumulate,
                       at<float>(product.c, (row + i) * product.c_row + col + j), product.c_row,
                       std::min(a.panel, a.size - i), std::min(b.panel, b.size - j));
      }
    }
  }
};

}  // namespace

void multiply(const Product& p, int threads) {
  static thread_local Packed packed;
  const Kernels& k = kernels();
  const int64_t deepest = std::min(kDepth, p.depth);
  const auto floats = [&](int64_t size, int64_t panel) {
    return ceil_div(std::min(size, kSide), panel) * panel * deepest;
  };
  float *a_to = packed.a.get(floats(p.rows, k.rows)), *b_to = packed.b.get(floats(p.cols, k.cols));
  for (int64_t col = 0; col < p.cols; col += kSide) {
    for (int64_t d = 0; d < p.depth; d += kDepth) {
      const int64_t depth = std::min(kDepth, p.depth - d);
      const Side b = {at<float>(p.b, d * p.b_row + col * p.b_col), p.b_col, p.b_row,
                      std::min(kSide, p.cols - col), k.cols, b_to};
      for (int64_t row = 0; row < p.rows; row += kSide) {
        const Side a = {at<float>(p.a, row * p.a_row + d * p.a_col), p.a_row, p.a_col,
                        std::min(kSide, p.rows - row), k.rows, a_to};
        if (p.lower && row + a.size <= col) continue;
        // b is packed anew for each block of rows: that takes a thousandth of their products.
        parallel_for(a.tasks() + b.tasks(), threads, [&](int64_t i) {
          if (i < a.tasks()) {
            a.pack(i, depth);
          } else {
            b.pack(i - a.tasks(), depth);
          }
        });
        const Block block = {p, a, b, row, col, depth, p.accumulate || d > 0};
        const int64_t fair = ceil_div(a.size, int64_t{4} * threads);
        const int64_t task_rows = ceil_div(std::min(kTaskRows, fair), k.rows) * k.rows;
        const int64_t col_tasks = ceil_div(b.size, kTaskCols);
        parallel_for_uneven(ceil_div(a.size, task_rows) * col_tasks, threads, [&](int64_t i) {
          block.multiply(i / col_tasks, i % col_tasks, task_rows);
        });
      }
    }
  }
}

}  // namespace gemm

namespace {

void gemm_from_python(uintptr_t a, int64_t a_row, int64_t a_col, uintptr_t b, int64_t b_row,
                      int64_t b_col, uintptr_t c, int64_t c_row, int64_t rows, int64_t cols,
                      int64_t depth, float scale, bool accumulate, bool lower, int threads) {
  gemm::multiply({pointer(a), a_row, a_col, pointer(b), b_row, b_col, pointer(c), c_row, rows, cols,
                  depth, scale, accumulate, lower},
                 threads);
}

}  // namespace

void register_gemm(py::module_& module) {
  module.def("gemm", &gemm_from_python, py::call_guard<py::gil_scoped_release>(), py::arg("a"),
             py::arg("a_row"), py::arg("a_col"), py::arg("b"), py::arg("b_row"), py::arg("b_col"),
             py::arg("c"), py::arg("c_row"), py::arg("rows"), py::arg("cols"), py::arg("depth"),
             py::arg("scale"), py::arg("accumulate"), py::arg("lower"), py::arg("threads"));
}

}  // namespace tailor_fast
