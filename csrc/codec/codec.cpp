// Python face of the `codec` kernels: addresses and sizes in, numbers out, the GIL released.
#include "codec/codec.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "modules.h"

namespace py = pybind11;

namespace tailor_fast {
namespace {

// Calls body(T{}) with the unsigned word type of `width` bytes.
template <typename Body>
auto by_width(int width, const Body& body) {
  switch (width) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    case 8:
      return body(uint64_t{});
    default:
      throw std::invalid_argument("width must be 1, 2, 4 or 8; got " + std::to_string(width));
  }
}

const uint8_t* bytes(uintptr_t address) { return static_cast<const uint8_t*>(pointer(address)); }

int64_t mark(uintptr_t base, uintptr_t tuned, uintptr_t allow, int64_t size, int width,
             uintptr_t mask, uintptr_t counts, int threads) {
  return by_width(width, [=](auto word) {
    return codec::mark<decltype(word)>(pointer(base), pointer(tuned), bytes(allow), size,
                                       static_cast<uint8_t*>(pointer(mask)), pointer(counts),
                                       threads);
  });
}

void gather(uintptr_t base, uintptr_t tuned, int64_t size, int width, uintptr_t mask,
            uintptr_t counts, uintptr_t words, int threads) {
  by_width(width, [=](auto word) {
    codec::gather<decltype(word)>(pointer(base), pointer(tuned), size, bytes(mask),
                                  pointer(counts), pointer(words), threads);
  });
}

using FaultTuple = std::tuple<const char*, int64_t, int64_t, int64_t>;

std::optional<FaultTuple> apply(uintptr_t target, int64_t size, int width, uintptr_t mask,
                                uintptr_t counts, uintptr_t words, int64_t word_count,
                                int threads) {
  const auto fault = by_width(width, [=](auto word) {
    return codec::apply<decltype(word)>(pointer(target), size, bytes(mask), pointer(counts),
                                        pointer(words), word_count, threads);
  });
  if (!fault) return std::nullopt;
  return FaultTuple{fault->kind, fault->index, fault->expected, fault->got};
}

}  // namespace

void register_codec(py::module_& module) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("codec_mark", &mark, release, py::arg("base"), py::arg("tuned"), py::arg("allow"),
             py::arg("size"), py::arg("width"), py::arg("mask"), py::arg("counts"),
             py::arg("threads"));
  module.def("codec_gather", &gather, release, py::arg("base"), py::arg("tuned"), py::arg("size"),
             py::arg("width"), py::arg("mask"), py::arg("counts"), py::arg("words"),
             py::arg("threads"));
  module.def("codec_apply", &apply, release, py::arg("target"), py::arg("size"), py::arg("width"),
             py::arg("mask"), py::arg("counts"), py::arg("words"), py::arg("word_count"),
             py::arg("threads"));
}

}  // namespace tailor_fast
