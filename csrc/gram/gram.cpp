// Python face of the `gram` kernels: addresses and sizes in, the GIL released.
//
// `index` holds the counted tokens, int64, or is 0 where all count.
#include <pybind11/pybind11.h>

#include <algorithm>

#include "common/bytes.h"
#include "common/cpu.h"
#include "common/parallel.h"
#include "gram/kernels.h"
#include "modules.h"

namespace py = pybind11;

namespace tailor_fast {
namespace gram {

const Kernels& kernels() { return TAILOR_FAST_KERNELS(kGram); }

}  // namespace gram

namespace {

using gram::Kind;

constexpr int64_t kPiece = 64;   // tokens that one task converts
constexpr int64_t kTask = 1024;  // tokens that one task of the diagonal sums

const void* row_of(uintptr_t x, Kind kind, int64_t cols, const int64_t* index, int64_t token) {
  const int64_t row = index == nullptr ? token : index[token];
  return static_cast<const char*>(pointer(x)) + row * cols * gram::element_size(kind);
}

// out[t] = the counted token first + t as float32, for t in [0, count).
void convert(uintptr_t x, int kind, int64_t cols, uintptr_t index, int64_t first, int64_t count,
             uintptr_t out, int threads) {
  const auto* tokens = static_cast<const int64_t*>(pointer(index));
  const auto type = static_cast<Kind>(kind);
  auto* to = static_cast<float*>(pointer(out));
  parallel_for((count + kPiece - 1) / kPiece, threads, [=](int64_t piece) {
    for (int64_t t = piece * kPiece; t < std::min(count, (piece + 1) * kPiece); ++t) {
      gram::kernels().convert(type, row_of(x, type, cols, tokens, first + t), to + t * cols, cols);
    }
  });
}

// diag [cols] += squares of the first `count` counted tokens. The order of additions does not depend
// on the number of threads, so neither do the bits. `sums` is float64 [ceil(count / kTask), cols], 0.
void add_diagonal(uintptr_t diag, uintptr_t x, int kind, int64_t cols, uintptr_t index,
                  int64_t count, uintptr_t sums, int threads) {
  const auto* tokens = static_cast<const int64_t*>(pointer(index));
  const auto type = static_cast<Kind>(kind);
  auto* parts = static_cast<double*>(pointer(sums));
  const int64_t tasks = (count + kTask - 1) / kTask;
  parallel_for_uneven(tasks, threads, [=](int64_t task) {
    const void* rows[kTask];
    const int64_t some = std::min(kTask, count - task * kTask);
    for (int64_t t = 0; t < some; ++t) rows[t] = row_of(x, type, cols, tokens, task * kTask + t);
    gram::kernels().add_squares(type, rows, some, parts + task * cols, cols);
  });
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t c = 0; c < cols; ++c) parts[c] += parts[task * cols + c];
  }
  for (int64_t c = 0; c < cols && tasks > 0; ++c) {
    store<float>(pointer(diag), c, static_cast<float>(load<float>(pointer(diag), c) + parts[c]));
  }
}

}  // namespace

void register_gram(py::module_& module) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.attr("GRAM_DIAGONAL_TOKENS") = kTask;
  module.def("gram_convert", &convert, release, py::arg("x"), py::arg("kind"), py::arg("cols"),
             py::arg("index"), py::arg("first"), py::arg("count"), py::arg("out"),
             py::arg("threads"));
  module.def("gram_add_diagonal", &add_diagonal, release, py::arg("diag"), py::arg("x"),
             py::arg("kind"), py::arg("cols"), py::arg("index"), py::arg("count"), py::arg("sums"),
             py::arg("threads"));
}

}  // namespace tailor_fast
