// Gathers A_KK of each row and solves it, see row.h.
//
// Rows go by groups, so that a row of the Gram that has come into the cache serves all of them:
// once where it is multiplied by the reverted deltas, once where A_KK is gathered.
#include "decorate/exact.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "common/bytes.h"
#include "common/parallel.h"
#include "decorate/kernels.h"
#include "decorate/row.h"
#include "decorate/support.h"

namespace tailor_fast::decorate {
namespace {

constexpr int64_t kMostRows = 128;  // of a group: a strip of their vectors fills half of a common L2
constexpr int64_t kWorkspace = int64_t{1} << 23;  // floats of gathered matrices at a time: 32 MiB
struct Group {
  const Exact& problem;
  const int64_t* ids;  // rows of the problem
  int64_t rows;
  Support support;
  std::vector<double> reverted_norm;  // |d|^2 outside the mask
  std::vector<double> pull;           // rhs_K, or (G d_R)_K, in the order of support.columns

  Group(const Exact& p, const int64_t* group_ids, int64_t group_rows)
      : problem(p),
        ids(group_ids),
        rows(group_rows),
        support(p.mask, group_ids, group_rows, p.cols),
        reverted_norm(group_rows),
        pull(support.columns.size()) {}

  float delta(int64_t row, int64_t col) const {
    return load<float>(problem.delta, ids[row] * problem.cols + col);
  }
  bool kept(int64_t row, int64_t col) const {
    return problem.mask[ids[row] * problem.cols + col] != 0;
  }
};

void find_reverted_norms(Group& group) {
  for (int64_t r = 0; r < group.rows; ++r) {
    double total = 0;
    for (int64_t c = 0; c < group.problem.cols; ++c) {
      const double d = group.kept(r, c) ? 0.0 : group.delta(r, c);
      total += d * d;
    }
    group.reverted_norm[r] = total;
  }
}

void pull_from_right_side(Group& group) {
  for (int64_t r = 0; r < group.rows; ++r) {
    for (int64_t i = group.support.row_start[r]; i < group.support.row_start[r + 1]; ++i) {
      const int64_t index = group.ids[r] * group.problem.cols + group.support.columns[i];
      group.pull[i] = load<float>(group.problem.rhs, index);
    }
  }
}

// Packed A_KK of the rows [begin, end) of a group, and its diagonals; both by row of the range.
void gather(const Group& group, int64_t begin, int64_t end, const std::vector<float*>& packed,
            const std::vector<double*>& diagonals) {
  const int64_t cols = group.problem.cols;
  const Support& support = group.support;
  for (int64_t r = begin; r < end; ++r) {  // rows past the last one of each matrix
    const int64_t size = support.size(r), panel = size / kPanel, length = panel_length(panel);
    if (size % kPanel == 0) continue;
    float* out = packed[r - begin] + panels_size(panel);
    std::fill(out + size % kPanel * length, out + kPanel * length, 0.0f);
  }
  for (int64_t c = 0; c < cols; ++c) {
    const char* a = at<float>(group.problem.gram, c * cols);
    if (c + 1 < cols) prefetch_floats(at<float>(a, cols), c + 2);
    for (int64_t e = support.column_start[c]; e < support.column_start[c + 1]; ++e) {
      const int64_t row = support.row_of[e], position = support.position_of[e];
      if (row < begin || row >= end) continue;
      const int64_t panel = position / kPanel;
      float* out = packed[row - begin] + panels_size(panel) +
                   (position % kPanel) * panel_length(panel);
      const int32_t* columns = support.columns.data() + support.row_start[row];
      const uint8_t* mask = group.problem.mask + group.ids[row] * cols;
      kernels().gather(a, mask, columns, position, out);
      std::fill(out + position, out + panel_length(panel), 0.0f);
      diagonals[row - begin][position] = load<float>(a, c) + group.problem.damping;
    }
  }
}

// Rows [begin, end) of a group: their matrices stand in the workspace together.
void solve_range(const Group& group, int64_t begin, int64_t end, Workspace& workspace) {
  const Exact& problem = group.problem;
  std::vector<float*> packed_of;
  std::vector<double*> diagonal_of;
  int64_t matrices = 0, vectors = 0;
  for (int64_t r = begin; r < end; ++r) {
    matrices += packed_size(group.support.size(r));
    vectors += padded(group.support.size(r));
  }
  float* packed = workspace.packed.get(matrices);
  double* diagonals = workspace.diagonals.zeros(vectors);
  for (int64_t r = begin; r < end; ++r) {
    packed_of.push_back(packed);
    diagonal_of.push_back(diagonals);
    packed += packed_size(group.support.size(r));
    diagonals += padded(group.support.size(r));
  }
  gather(group, begin, end, packed_of, diagonal_of);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = group.ids[r], start = group.support.row_start[r];
    char* patch = at<float>(problem.patch, row * problem.cols);
    std::memset(patch, 0, problem.cols * sizeof(float));
    const Given given = {at<float>(problem.delta, row * problem.cols),
                         group.support.columns.data() + start,
                         group.pull.data() + start,
                         packed_of[r - begin],
                         diagonal_of[r - begin],
                         group.support.size(r),
                         group.reverted_norm[r]};
    Row equations(problem, given, workspace);
    equations.solve(problem.stats + row * kStats);
    for (int64_t i = 0; i < given.size; ++i) {
      store<float>(patch, given.columns[i], static_cast<float>(equations.value(i)));
    }
  }
}

void solve_group(const Exact& problem, const int64_t* ids, int64_t rows, Workspace& workspace) {
  Group group(problem, ids, rows);
  find_reverted_norms(group);
  if (problem.rhs == nullptr) {
    group.pull = products(problem.gram, rows, problem.cols, group.support, workspace.strip,
                          [&](int64_t r, int64_t c) -> float {
                            return group.kept(r, c) ? 0.0f : group.delta(r, c);
                          });
  } else {
    pull_from_right_side(group);
  }
  for (int64_t r = 0; r < group.rows;) {
    int64_t stop = r, used = 0;
    do {
      used += packed_size(group.support.size(stop++));
    } while (stop < group.rows && used + packed_size(group.support.size(stop)) <= kWorkspace);
    solve_range(group, r, stop, workspace);
    r = stop;
  }
}

// The rows by falling number of kept weights, and the groups' first places in that order: at least
// eight groups a thread, of equal shares of what the rows cost, so that none waits long for the last.
struct Plan {
  std::vector<int64_t> ids, first;
};

Plan plan_groups(const Exact& problem, int threads) {
  std::vector<int64_t> kept(problem.rows);
  parallel_for(problem.rows, threads, [&](int64_t r) {
    const uint8_t* mask = problem.mask + r * problem.cols;
    kept[r] = std::count_if(mask, mask + problem.cols, [](uint8_t keeps) { return keeps != 0; });
  });
  Plan plan;
  plan.ids.resize(problem.rows);
  std::iota(plan.ids.begin(), plan.ids.end(), int64_t{0});
  std::stable_sort(plan.ids.begin(), plan.ids.end(),
                   [&](int64_t a, int64_t b) { return kept[a] > kept[b]; });
  // Dot products of a row take cols multiplications per kept weight, iterations about 16 per pair.
  const auto cost = [&](int64_t r) {
    return static_cast<double>(kept[r]) * static_cast<double>(problem.cols + 16 * kept[r]) + 1;
  };
  double total = 0;
  for (int64_t r = 0; r < problem.rows; ++r) total += cost(r);
  const double share = total / (8.0 * threads);
  double filled = 0;
  for (int64_t i = 0; i < problem.rows; ++i) {
    if (plan.first.empty() || filled >= share || i - plan.first.back() == kMostRows) {
      plan.first.push_back(i);
      filled = 0;
    }
    filled += cost(plan.ids[i]);
  }
  plan.first.push_back(problem.rows);
  return plan;
}

}  // namespace

void solve_exact(const Exact& problem, int threads) {
  const Plan plan = plan_groups(problem, threads);
  const auto groups = static_cast<int64_t>(plan.first.size()) - 1;
  std::vector<Workspace> workspaces(used_threads(groups, threads));
  parallel_from_both_ends(groups, threads, [&](int64_t i, int thread) {
    const int64_t begin = plan.first[i], end = plan.first[i + 1];
    solve_group(problem, plan.ids.data() + begin, end - begin, workspaces[thread]);
  });
}

}  // namespace tailor_fast::decorate
