// What bindings.cpp calls: one function per op, defined beside the op's kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace tailor_fast {

void register_codec(pybind11::module_& module);

}  // namespace tailor_fast
