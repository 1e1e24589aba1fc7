// Which vector instructions hand-written loops may use: decided at run time, so that one build serves every
// x86-64. A loop takes its width as an argument, so that tests can run the narrow ones on a wide machine.
#pragma once
#include <string_view>

#include "hd.h"

#if SHIRA_X86
#if defined(__GNUC__) && !defined(__clang__)  // gcc 12's own header causes a warning once it is inlined
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <cpuid.h>
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

namespace shira::core {

enum class Width { Portable, Avx2, Avx512 };

#if !defined(__CUDACC__)
#if SHIRA_X86
// clang's __builtin_cpu_supports learnt this name late. Whether the system saves the registers is checked with "avx2".
inline bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

inline Width widest() {
#if SHIRA_X86
  static const Width best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2"))
      return Width::Avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) return Width::Avx2;
    return Width::Portable;
  }();
  return best;
#else
  return Width::Portable;
#endif
}

// "portable", "avx2" or "avx512" where this processor has it; false for any other name.
inline bool find_width(std::string_view name, Width& width) {
  if (name == "portable")
    width = Width::Portable;
  else if (name == "avx2")
    width = Width::Avx2;
  else if (name == "avx512")
    width = Width::Avx512;
  else
    return false;
  return width <= widest();
}
#endif

#define SHIRA_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#define SHIRA_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,popcnt")))

}  // namespace shira::core
