// What bindings.cpp calls: one function per op, defined beside the op's kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace tailor_fast {

void register_codec(pybind11::module_& module);
void register_decorate(pybind11::module_& module);
void register_gemm(pybind11::module_& module);
void register_gram(pybind11::module_& module);
void register_select(pybind11::module_& module);

}  // namespace tailor_fast
