// The extension module: raw addresses and sizes in, no Torch header, so one build serves any torch.
// Callers are the `native.py` of each op, which have checked shapes, dtypes and strides.
#include <pybind11/stl.h>

#include "common/cpu.h"
#include "modules.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of tailor_fast in C++; call them through tailor_fast.ops.";
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  // Of `decorate`, `gemm`, `gram` and `select`.
  module.def("instruction_sets", &tailor_fast::instruction_sets);
  module.def("made_by_intel", &tailor_fast::made_by_intel);
  module.def("use_instruction_set", &tailor_fast::use_instruction_set, pybind11::arg("name"));
  tailor_fast::register_codec(module);
  tailor_fast::register_decorate(module);
  tailor_fast::register_gemm(module);
  tailor_fast::register_gram(module);
  tailor_fast::register_select(module);
}
