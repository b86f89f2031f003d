// Python face of the `decorate` kernels: addresses and sizes in, the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "common/bytes.h"
#include "common/cpu.h"
#include "common/parallel.h"
#include "decorate/exact.h"
#include "decorate/kernels.h"
#include "decorate/losses.h"
#include "modules.h"

namespace py = pybind11;

namespace tailor_fast {
namespace decorate {

const Kernels& kernels() { return TAILOR_FAST_KERNELS(kDecorate); }

}  // namespace decorate

namespace {

template <typename T>
T* array(uintptr_t address) {
  return static_cast<T*>(pointer(address));
}

void exact(uintptr_t delta, uintptr_t mask, uintptr_t rhs, uintptr_t gram, int64_t rows,
           int64_t cols, double damping, double tol, int64_t max_iterations, uintptr_t patch,
           uintptr_t stats, int threads) {
  decorate::solve_exact({pointer(delta), array<uint8_t>(mask), pointer(rhs), pointer(gram), rows,
                         cols, damping, tol, max_iterations, pointer(patch), array<double>(stats)},
                        threads);
}

decorate::Objectives objectives(uintptr_t errors, uintptr_t delta, uintptr_t patch, uintptr_t mask,
                                uintptr_t upper, int64_t rows, int64_t cols, int threads) {
  return decorate::find_objectives({array<float>(errors), array<float>(delta), array<float>(patch),
                                    array<uint8_t>(mask), array<float>(upper), rows, cols},
                                   threads);
}

constexpr int64_t kChunk = 32;  // rows of one task of a sweep

// Calls run(begin, end, scratch) for chunks of rows; scratch holds as much for each swept row.
template <typename Run>
void by_rows(int64_t rows, int64_t width, int threads, const Run& run) {
  parallel_for((rows + kChunk - 1) / kChunk, threads, [&](int64_t i) {
    std::vector<float> scratch(decorate::kSweepRows * decorate::padded(width));
    run(i * kChunk, std::min(rows, (i + 1) * kChunk), scratch.data());
  });
}

void sweep(uintptr_t weight, int64_t weight_stride, uintptr_t mask, int64_t mask_stride,
           uintptr_t target, int64_t target_stride, uintptr_t factor, uintptr_t diagonal,
           uintptr_t errors, int64_t errors_stride, int64_t rows, int64_t width, int64_t first,
           int64_t last, int threads) {
  const decorate::Sweep block = {array<float>(weight), weight_stride,
                                 array<uint8_t>(mask), mask_stride,
                                 array<float>(target), target_stride,
                                 array<float>(factor), array<float>(diagonal),
                                 array<float>(errors), errors_stride,
                                 width,                first,
                                 last};
  by_rows(rows, width, threads, [&](int64_t begin, int64_t end, float* scratch) {
    decorate::kernels().sweep(block, begin, end, scratch);
  });
}

// A sweep towards 0 of a whole block of a delta: its part of the patch, and what is left of it. The
// arrays that start at the block have rows of `cols`.
void sweep_delta(uintptr_t weight, uintptr_t delta, uintptr_t mask, uintptr_t factor,
                 uintptr_t diagonal, uintptr_t errors, uintptr_t patch, uintptr_t rest,
                 int64_t rows, int64_t width, int64_t cols, int threads) {
  const decorate::Sweep block = {array<float>(weight), width, array<uint8_t>(mask), cols,
                                 nullptr,              0,     array<float>(factor),
                                 array<float>(diagonal), array<float>(errors), cols,
                                 width,                  0,                    width};
  by_rows(rows, width, threads, [&](int64_t begin, int64_t end, float* scratch) {
    decorate::kernels().sweep(block, begin, end, scratch);
    for (int64_t r = begin; r < end; ++r) {
      const float* settled = block.weight + r * width;
      const uint8_t* kept = block.mask + r * cols;
      const float* before = array<float>(delta) + r * cols;
      float *some = array<float>(patch) + r * cols, *others = array<float>(rest) + r * cols;
      for (int64_t j = 0; j < width; ++j) {
        some[j] = kept[j] ? settled[j] : 0.0f;
        others[j] = before[j] - some[j];
      }
    }
  });
}

void score(uintptr_t weight, int64_t weight_stride, uintptr_t salience, uintptr_t squares,
           uintptr_t out, int64_t rows, int64_t width, float salience_weight,
           float sensitivity_weight, bool guarded, int threads) {
  const decorate::Score block = {array<float>(weight),  weight_stride,      array<float>(salience),
                                 array<float>(squares), array<float>(out),  width,
                                 salience_weight,       sensitivity_weight, guarded};
  by_rows(rows, width, threads, [&](int64_t begin, int64_t end, float* scratch) {
    decorate::kernels().score(block, begin, end, scratch);
  });
}

}  // namespace

void register_decorate(py::module_& module) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("decorate_exact", &exact, release, py::arg("delta"), py::arg("mask"), py::arg("rhs"),
             py::arg("gram"), py::arg("rows"), py::arg("cols"), py::arg("damping"), py::arg("tol"),
             py::arg("max_iterations"), py::arg("patch"), py::arg("stats"), py::arg("threads"));
  module.def("decorate_objectives", &objectives, release, py::arg("errors"), py::arg("delta"),
             py::arg("patch"), py::arg("mask"), py::arg("upper"), py::arg("rows"),
             py::arg("cols"), py::arg("threads"));
  module.def("decorate_sweep", &sweep, release, py::arg("weight"), py::arg("weight_stride"),
             py::arg("mask"), py::arg("mask_stride"), py::arg("target"), py::arg("target_stride"),
             py::arg("factor"), py::arg("diagonal"), py::arg("errors"), py::arg("errors_stride"),
             py::arg("rows"), py::arg("width"), py::arg("first"), py::arg("last"),
             py::arg("threads"));
  module.def("decorate_sweep_delta", &sweep_delta, release, py::arg("weight"), py::arg("delta"),
             py::arg("mask"), py::arg("factor"), py::arg("diagonal"), py::arg("errors"),
             py::arg("patch"), py::arg("rest"), py::arg("rows"), py::arg("width"),
             py::arg("cols"), py::arg("threads"));
  module.def("decorate_score", &score, release, py::arg("weight"), py::arg("weight_stride"),
             py::arg("salience"), py::arg("squares"), py::arg("score"), py::arg("rows"),
             py::arg("width"), py::arg("salience_weight"), py::arg("sensitivity_weight"),
             py::arg("guarded"), py::arg("threads"));
}

}  // namespace tailor_fast
