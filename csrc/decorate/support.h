// Groups of rows under a mask: where their kept weights stand, and products with the Gram at those
// places alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/bytes.h"
#include "common/parallel.h"
#include "decorate/kernels.h"

namespace tailor_fast::decorate {

constexpr int64_t kStrip = 512;           // columns of a group's vectors multiplied at a time
constexpr int64_t kStripBytes = 1 << 19;  // of them for all its rows: half of a common L2 cache

// Memory for vectors and packed matrices, aligned to a cache line; its values are whatever they
// are.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_(new T[size + 64 / sizeof(T)]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  T* data() { return data_; }
  void clear(int64_t size) { std::fill(data_, data_ + size, T{}); }

 private:
  std::unique_ptr<T[]> memory_;
  T* data_;
};

// Where the kept weights of a group stand, by rows and by columns.
struct Support {
  std::vector<int64_t> row_start;  // [rows + 1] into `columns`
  std::vector<int32_t> columns;    // kept columns of each row, ascending
  std::vector<int64_t> column_start;  // [cols + 1] into the next two, with one more behind
  std::vector<int32_t> row_of;        // rows of the group that keep each column, ascending
  std::vector<int32_t> position_of;   // the column's place among those that the row keeps

  Support(const uint8_t* mask, int64_t rows, int64_t cols)
      : row_start(rows + 1), column_start(cols + 2) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        if (mask[r * cols + c]) columns.push_back(static_cast<int32_t>(c));
      }
      row_start[r + 1] = static_cast<int64_t>(columns.size());
    }
    row_of.resize(columns.size());
    position_of.resize(columns.size());
    for (const int32_t c : columns) ++column_start[c + 2];
    for (int64_t c = 0; c < cols; ++c) column_start[c + 2] += column_start[c + 1];
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = row_start[r]; i < row_start[r + 1]; ++i) {
        const int64_t entry = column_start[columns[i] + 1]++;
        row_of[entry] = static_cast<int32_t>(r);
        position_of[entry] = static_cast<int32_t>(i - row_start[r]);
      }
    }
  }
  int64_t size(int64_t row) const { return row_start[row + 1] - row_start[row]; }
};

inline void dots(const double* x, const int32_t* rows, int64_t count, const void* a, int64_t size,
                 double* sums) {
  kernels().dots_double(x, kStrip, rows, count, a, size, sums);
}
inline void dots(const float* x, const int32_t* rows, int64_t count, const void* a, int64_t size,
                 double* sums) {
  kernels().dots_float(x, kStrip, rows, count, a, size, sums);
}

// Products (G v)_K of a group's rows, only those that are asked for, in the order of
// support.columns. `value(row, col)` gives v. In float64, or in float32 within strips of kStrip.
template <typename Real, typename Value>
std::vector<double> products(const void* gram, int64_t rows, int64_t cols, const Support& support,
                             const Value& value) {
  Buffer<Real> strip(rows * kStrip);
  std::vector<double> sums(support.row_of.size());
  for (int64_t start = 0; start < cols; start += kStrip) {
    const int64_t width = std::min(kStrip, cols - start);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        strip.data()[r * kStrip + c] = static_cast<Real>(value(r, start + c));
      }
    }
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t e = support.column_start[c];
      dots(strip.data(), support.row_of.data() + e, support.column_start[c + 1] - e,
           at<float>(gram, c * cols + start), width, sums.data() + e);
    }
  }
  std::vector<double> result(sums.size());
  for (size_t e = 0; e < sums.size(); ++e) {
    result[support.row_start[support.row_of[e]] + support.position_of[e]] = sums[e];
  }
  return result;
}

// Calls body(begin, end) for groups of rows, at least four a thread, so that none waits long for
// the last. A row's result does not depend on its group.
template <typename Real, typename Body>
void each_group(int64_t rows, int threads, const Body& body) {
  constexpr int64_t most = kStripBytes / (kStrip * sizeof(Real));
  const int64_t share = (rows + 4 * threads - 1) / (4 * threads);
  const int64_t step = std::max<int64_t>(1, std::min(most, share));
  parallel_for_uneven((rows + step - 1) / step, threads, [&](int64_t i) {
    body(i * step, std::min(rows, (i + 1) * step));
  });
}

}  // namespace tailor_fast::decorate
