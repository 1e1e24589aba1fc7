// Loops over contiguous buffers, compiled for several vector widths and chosen at run time: one wheel for
// every x86-64. The body is plain C++; only the instruction set differs, and with contraction off the bits
// are the same on all of them.
#pragma once
#include "../core/hd.h"

namespace shira::cpu {

enum class Isa { Portable, Avx2, Avx512 };

inline Isa isa() {
#if SHIRA_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return Isa::Avx512;
    return __builtin_cpu_supports("avx2") ? Isa::Avx2 : Isa::Portable;
  }();
  return best;
#else
  return Isa::Portable;
#endif
}

// f(i) for i in [0, n), as wide as this processor goes. f must be inlinable: a lambda over core/ functions.
template <typename F>
inline void loop_portable(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; ++i) f(i);
}
#if SHIRA_X86
template <typename F>
__attribute__((target("avx2"))) inline void loop_avx2(int64_t n, const F& f) {
  for (int64_t i = 0; i < n; ++i) f(i);
}
template <typename F>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) inline void loop_avx512(
    int64_t n, const F& f) {
  for (int64_t i = 0; i < n; ++i) f(i);
}
#endif

template <typename F>
inline void vector_loop(int64_t n, const F& f) {
#if SHIRA_X86
  switch (isa()) {
    case Isa::Avx512: return loop_avx512(n, f);
    case Isa::Avx2: return loop_avx2(n, f);
    case Isa::Portable: break;
  }
#endif
  loop_portable(n, f);
}

}  // namespace shira::cpu
