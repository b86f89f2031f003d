// Some rows under a mask: where their kept weights stand, and products with the Gram at those places
// alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/bytes.h"
#include "common/memory.h"
#include "decorate/kernels.h"

namespace tailor_fast::decorate {

constexpr int64_t kStrip = 1024;  // columns of a group's vectors that are multiplied at a time

// Where the kept weights of some rows stand, by rows and by columns.
struct Support {
  std::vector<int64_t> row_start;  // [rows + 1] into `columns`
  std::vector<int32_t> columns;    // kept columns of each row, ascending
  std::vector<int64_t> column_start;  // [cols + 1] into the next two, with one more behind
  std::vector<int32_t> row_of;        // rows that keep each column, ascending
  std::vector<int32_t> position_of;   // the column's place among those that the row keeps

  // `ids` are the rows' places in `mask`.
  Support(const uint8_t* mask, const int64_t* ids, int64_t rows, int64_t cols)
      : row_start(rows + 1), column_start(cols + 2) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* kept = mask + ids[r] * cols;
      for (int64_t c = 0; c < cols; ++c) {
        if (kept[c]) columns.push_back(static_cast<int32_t>(c));
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

// Jumps from row to row of a wide matrix are not foreseen by the hardware.
inline void prefetch_floats(const char* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(at<float>(from, i));
}

// Products (G v)_K of some rows, only those that are asked for, in the order of support.columns.
// `value(row, col)` gives v.
template <typename Value>
std::vector<double> products(const void* gram, int64_t rows, int64_t cols, const Support& support,
                             Buffer<float>& memory, const Value& value) {
  float* strip = memory.get(rows * kStrip);
  std::vector<double> sums(support.row_of.size());
  for (int64_t start = 0; start < cols; start += kStrip) {
    const int64_t width = std::min(kStrip, cols - start);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) strip[r * kStrip + c] = value(r, start + c);
    }
    for (int64_t c = 0; c < cols; ++c) {
      if (c + 1 < cols) prefetch_floats(at<float>(gram, (c + 1) * cols + start), width);
      const int64_t e = support.column_start[c];
      kernels().dots(strip, kStrip, support.row_of.data() + e, support.column_start[c + 1] - e,
                     at<float>(gram, c * cols + start), width, sums.data() + e);
    }
  }
  std::vector<double> result(sums.size());
  for (size_t e = 0; e < sums.size(); ++e) {
    result[support.row_start[support.row_of[e]] + support.position_of[e]] = sums[e];
  }
  return result;
}

}  // namespace tailor_fast::decorate
