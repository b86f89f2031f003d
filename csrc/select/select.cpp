// Python face of the `select` kernels: addresses and sizes in, numbers out, the GIL released.
#include "select/select.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "common/cpu.h"
#include "common/memory.h"
#include "modules.h"
#include "select/count.h"

namespace py = pybind11;

namespace tailor_fast {
namespace select {

const Kernels& kernels() { return TAILOR_FAST_KERNELS(kSelect); }

}  // namespace select

namespace {

using select::Affine;
using select::Fault;
using select::Normalize;
using select::Pair;

// base, tuned, column_weight, rows, cols, dtype, terms, salience_weight, normalize, affine.
using PairTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int, int, double,
                             int, uintptr_t>;
using FaultTuple = std::optional<std::tuple<int64_t, float>>;

FaultTuple tuple_of(const Fault& fault) {
  if (!fault) return std::nullopt;
  return std::make_tuple(fault.index, fault.value);
}

// A pair, and the moments that it needs but was not given.
class Measured {
 public:
  Measured(const PairTuple& tuple, int threads) {
    const auto& [base, tuned, weight, rows, cols, dtype, terms, salience, normalize, affine] =
        tuple;
    pair = Pair{&select::kernels(),
                pointer(base),
                pointer(tuned),
                pointer(weight),
                rows,
                cols,
                static_cast<select::Dtype>(dtype),
                static_cast<select::Terms>(terms),
                {salience, 1 - salience},
                static_cast<Normalize>(normalize)};
    const bool tensor = pair.normalize == Normalize::kTensor;
    if ((!tensor && pair.normalize != Normalize::kRow) || rows * cols == 0) return;
    affine_.resize(tensor ? 1 : rows);
    pair.affine = affine_.data();
    if (affine == 0) {
      fault = select::measure(pair, affine_.data(), threads);
      return;
    }
    int64_t at = 0;
    for (int term : used(pair)) {
      affine_[0].mean[term] = load<float>(pointer(affine), at++);
      affine_[0].factor[term] = load<float>(pointer(affine), at++);
    }
  }

  static std::vector<int> used(const Pair& pair) {
    if (has_both(pair.terms)) return {0, 1};
    return {has_salience(pair.terms) ? 0 : 1};
  }

  Pair pair;
  Fault fault;

 private:
  std::vector<Affine> affine_;
};

using MaskTuple = std::tuple<FaultTuple, int64_t, int64_t>;
using BracketTuple = std::tuple<float, int64_t, float, int64_t>;  // score and index of two cuts

MaskTuple select_mask(const PairTuple& tuple, int64_t unit_rows, int64_t unit_cols, int64_t k,
                      int64_t last_k, uintptr_t mask, int threads, int64_t stream_from,
                      int64_t budget_part, const std::optional<BracketTuple>& bracket) {
  const Measured measured(tuple, threads);
  if (measured.fault) return {tuple_of(measured.fault), 0, 0};
  const Pair& pair = measured.pair;
  use_huge_pages(pointer(mask), pair.rows * pair.cols);
  select::Tuning tuning;
  if (stream_from >= 0) tuning.stream_from = stream_from;
  if (budget_part > 0) tuning.budget_part = budget_part;
  if (bracket) {
    const auto& [score, index, last_score, last_index] = *bracket;
    tuning.bracket = {{score, index}, {last_score, last_index}};
  }
  const auto outcome = select::select_units(pair, {unit_rows, unit_cols, k, last_k},
                                            static_cast<uint8_t*>(pointer(mask)), tuning, threads);
  return {tuple_of(outcome.fault), outcome.passes, outcome.candidates};
}

std::tuple<FaultTuple, int64_t, int64_t> select_count(const PairTuple& tuple,
                                                      std::optional<int64_t> prefix, int64_t low,
                                                      int64_t high, uintptr_t counts,
                                                      uintptr_t keys, int threads) {
  const Measured measured(tuple, threads);
  if (measured.fault) return {tuple_of(measured.fault), 0, 0};
  const auto counted =
      select::count_keys(measured.pair, {prefix, low, high}, static_cast<int64_t*>(pointer(counts)),
                         static_cast<int32_t*>(pointer(keys)), threads);
  return {tuple_of(counted.fault), counted.found, counted.above};
}

std::tuple<FaultTuple, int64_t> select_mark(const PairTuple& tuple, int32_t threshold, int64_t ties,
                                            uintptr_t mask, int threads) {
  const Measured measured(tuple, threads);
  Fault fault = measured.fault;
  if (fault) return {tuple_of(fault), 0};
  const Pair& pair = measured.pair;
  use_huge_pages(pointer(mask), pair.rows * pair.cols);
  const select::Tuning tuning;
  select::Streamed streamed(pair, {0, pair.rows, 0, pair.cols},
                            static_cast<uint8_t*>(pointer(mask)), tuning, threads);
  // What takes nothing comes with a key beyond that of infinity.
  const float score = select::float_of(std::min(threshold, select::kInfinity));
  const int64_t taken = streamed.mark(score, ties, fault);
  return {tuple_of(fault), taken};
}

FaultTuple select_affine(const PairTuple& tuple, uintptr_t affine, int threads) {
  const Measured measured(tuple, threads);
  if (measured.fault) return tuple_of(measured.fault);
  int64_t at = 0;
  for (int term : Measured::used(measured.pair)) {
    store<float>(pointer(affine), at++, measured.pair.affine->mean[term]);
    store<float>(pointer(affine), at++, measured.pair.affine->factor[term]);
  }
  return std::nullopt;
}

FaultTuple select_scores(const PairTuple& tuple, uintptr_t scores, int threads) {
  const Measured measured(tuple, threads);
  if (measured.fault) return tuple_of(measured.fault);
  const Pair& pair = measured.pair;
  const select::Region region{0, pair.rows, 0, pair.cols};
  std::vector<Fault> faults(pair.rows);
  select::parallel_ieee(pair.rows, threads, [&](int64_t row) {
    select::Scratch x;
    const int64_t segments = region.row_segments();
    select::each_segment(region, row * segments, (row + 1) * segments,
                         [&](int64_t, int64_t col, int64_t count) {
                           const float* some = select::scores_of(pair, row, col, count, x);
                           if (some == nullptr) {
                             faults[row] = select::find_fault(pair, row, col, count, x);
                             return false;
                           }
                           std::memcpy(at<float>(pointer(scores), row * pair.cols + col), some,
                                       count * sizeof(float));
                           return true;
                         });
  });
  Fault fault;
  for (const Fault& found : faults) fault = select::first_of(fault, found);
  return tuple_of(fault);
}

// Reads 8-byte words and does nothing else: what memory gives at best, for the benchmarks.
uint64_t read_probe(const std::vector<uintptr_t>& arrays, int64_t words, int threads) {
  constexpr int64_t kChunk = 1 << 15;
  const select::Kernels& kernels = select::kernels();
  const int64_t chunks = (words + kChunk - 1) / kChunk;
  std::vector<uint64_t> sums(chunks);
  parallel_for(chunks, threads, [&](int64_t i) {
    const int64_t count = std::min(kChunk, words - i * kChunk);
    for (uintptr_t array : arrays) {
      sums[i] ^= kernels.read(at<uint64_t>(pointer(array), i * kChunk), count);
    }
  });
  uint64_t sum = 0;
  for (uint64_t part : sums) sum ^= part;
  return sum;
}

}  // namespace

void register_select(py::module_& module) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("select_mask", &select_mask, release, py::arg("pair"), py::arg("unit_rows"),
             py::arg("unit_cols"), py::arg("k"), py::arg("last_k"), py::arg("mask"),
             py::arg("threads"), py::arg("stream_from"), py::arg("budget_part"),
             py::arg("bracket"));
  module.def("select_count", &select_count, release, py::arg("pair"), py::arg("prefix"),
             py::arg("low"), py::arg("high"), py::arg("counts"), py::arg("keys"),
             py::arg("threads"));
  module.def("select_mark", &select_mark, release, py::arg("pair"), py::arg("threshold"),
             py::arg("ties"), py::arg("mask"), py::arg("threads"));
  module.def("select_affine", &select_affine, release, py::arg("pair"), py::arg("affine"),
             py::arg("threads"));
  module.def("select_scores", &select_scores, release, py::arg("pair"), py::arg("scores"),
             py::arg("threads"));
  module.def("read_probe", &read_probe, release, py::arg("arrays"), py::arg("words"),
             py::arg("threads"));
}

}  // namespace tailor_fast
