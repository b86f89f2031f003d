// Which of the kernels' instruction sets this CPU runs, and which of those are used.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

namespace tailor_fast {

// The sets that this build has and this CPU runs, the fastest last.
inline const std::vector<std::string>& instruction_sets() {
  static const std::vector<std::string> found = [] {
    std::vector<std::string> names = {"portable"};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt")) {
      names.push_back("avx2");
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
        names.push_back("avx512");
      }
    }
#endif
    return names;
  }();
  return found;
}

// Whether Intel made this CPU: of what Intel's own libraries use, other makes get a part.
inline bool made_by_intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Index into instruction_sets() of the one in use.
inline std::atomic<size_t>& used_instruction_set() {
  static std::atomic<size_t> used{instruction_sets().size() - 1};
  return used;
}

// For tests, so that the kernels of every set run on one machine.
inline void use_instruction_set(const std::string& name) {
  const auto& names = instruction_sets();
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == name) {
      used_instruction_set() = i;
      return;
    }
  }
  throw std::invalid_argument("no kernels for the instruction set " + name);
}

// The kernels of the set in use; a table exists once per set.
#if defined(__x86_64__)
#define TAILOR_FAST_KERNELS(table)                                          \
  (used_instruction_set() == 2   ? ::tailor_fast::avx512::table             \
   : used_instruction_set() == 1 ? ::tailor_fast::avx2::table               \
                                 : ::tailor_fast::portable::table)
#else
#define TAILOR_FAST_KERNELS(table) ::tailor_fast::portable::table
#endif

}  // namespace tailor_fast
