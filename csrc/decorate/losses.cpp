#include "decorate/losses.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/parallel.h"
#include "decorate/kernels.h"
#include "decorate/support.h"

namespace tailor_fast::decorate {
namespace {

// The kept weights of all rows, one after the other: what a strip needs of them, read in order.
struct Kept {
  std::vector<int64_t> starts;
  std::vector<int32_t> columns;
  std::vector<float> to_bare, to_nothing;

  Kept(const Changes& c, int threads) : starts(c.rows + 1) {
    parallel_for(c.rows, threads, [&](int64_t r) {
      const uint8_t* mask = c.mask + r * c.cols;
      starts[r + 1] = std::count_if(mask, mask + c.cols, [](uint8_t keeps) { return keeps != 0; });
    });
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    columns.resize(starts[c.rows]);
    to_bare.resize(starts[c.rows]);
    to_nothing.resize(starts[c.rows]);
    parallel_for(c.rows, threads, [&](int64_t r) {
      int64_t entry = starts[r];
      for (int64_t col = 0; col < c.cols; ++col) {
        const int64_t index = r * c.cols + col;
        if (!c.mask[index]) continue;
        columns[entry] = static_cast<int32_t>(col);
        to_bare[entry] = c.patch[index] - c.delta[index];
        to_nothing[entry++] = c.patch[index];
      }
    });
  }
};

}  // namespace

Objectives find_objectives(const Changes& c, int threads) {
  const Kept kept(c, threads);
  const int64_t width = kernels().strip, strips = (c.cols + width - 1) / width;
  std::vector<Buffer<float>> copies(used_threads(strips, threads));
  std::vector<Objectives> parts(strips, Objectives{});
  parallel_from_both_ends(strips, threads, [&](int64_t i, int thread) {
    const int64_t number = strips - 1 - i;  // the last ones have most rows above their diagonal
    const int64_t first = number * width, used = std::min(width, c.cols - first);
    const int64_t stop = first + used;
    // Side by side: rows of R are so far apart that a cache would keep few of them.
    float* strip = copies[thread].get(c.cols * width);
    for (int64_t j = 0; j < stop; ++j) {
      std::memcpy(strip + j * width, c.upper + j * c.cols + first, used * sizeof(float));
      std::fill_n(strip + j * width + used, width - used, 0.0f);
    }
    const Steps steps = {kept.columns.data(),    kept.starts.data(), kept.to_bare.data(),
                         kept.to_nothing.data(), strip,              c.errors + first,
                         c.cols,                 stop,               used};
    kernels().add_squares(steps, c.rows, parts[number].data());
  });
  Objectives sum = {};
  for (const Objectives& part : parts) {  // in order: the same bits at any number of threads
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += part[i];
  }
  return sum;
}

}  // namespace tailor_fast::decorate
