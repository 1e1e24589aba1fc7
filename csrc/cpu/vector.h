// Loops over contiguous buffers, compiled for several vector widths and chosen at run time: one wheel for
// every x86-64. The body is plain C++; only the instruction set differs, and with contraction off the bits
// are the same on all of them.
#pragma once
#include "../core/width.h"

namespace shira::cpu {

// A body that the caller compiles for its own instruction set must be inlined there.
#define SHIRA_INLINE __attribute__((always_inline)) inline
#define SHIRA_INLINE_LAMBDA __attribute__((always_inline))

#define SHIRA_LOOP_AVX2 __attribute__((target("avx2")))
#if defined(__clang__)  // which would ignore the whole target because of the name of gcc's option
#define SHIRA_LOOP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"), min_vector_width(512)))
#else
#define SHIRA_LOOP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#endif

// f(i) for i in [0, n), as wide as this processor goes. f must be inlinable: a lambda over core/ functions.
// `any` is true where f is true for some i; L is as wide as what f compares, so that lanes line up.
#define SHIRA_VECTOR_LOOPS(suffix, attribute)                      \
  template <typename F>                                            \
  attribute inline void loop_##suffix(int64_t n, const F& f) {     \
    for (int64_t i = 0; i < n; ++i) f(i);                          \
  }                                                                \
  template <typename L, typename F>                                \
  attribute inline bool any_##suffix(int64_t n, const F& f) {      \
    L found = 0;                                                   \
    for (int64_t i = 0; i < n; ++i) found |= static_cast<L>(f(i)); \
    return found != 0;                                             \
  }
SHIRA_VECTOR_LOOPS(portable, )
#if SHIRA_X86
SHIRA_VECTOR_LOOPS(avx2, SHIRA_LOOP_AVX2)
SHIRA_VECTOR_LOOPS(avx512, SHIRA_LOOP_AVX512)
#endif
#undef SHIRA_VECTOR_LOOPS

template <typename F>
inline void vector_loop(int64_t n, const F& f) {
#if SHIRA_X86
  if (core::widest() == core::Width::Avx512) return loop_avx512(n, f);
  if (core::widest() == core::Width::Avx2) return loop_avx2(n, f);
#endif
  loop_portable(n, f);
}

template <typename L, typename F>
inline bool vector_any(int64_t n, const F& f) {
#if SHIRA_X86
  if (core::widest() == core::Width::Avx512) return any_avx512<L>(n, f);
  if (core::widest() == core::Width::Avx2) return any_avx2<L>(n, f);
#endif
  return any_portable<L>(n, f);
}

}  // namespace shira::cpu
