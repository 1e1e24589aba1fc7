// The registers that products are computed in, for each vector width: what csrc/cpu/*_kernel.h are written over.
//
// A type of registers has
//   Value                   what a lane holds: float or double
//   Register, kLanes        a register and its number of lanes
//   kSums                   how many sums stay in registers, beside what is added to them
//   load(p)                 kLanes numbers of a dtype, as `Value`: exact
//   store, zero, add, multiply, multiply_add
//   broadcast(x)            a number in every lane
//   fused(a, b, sum)        multiply_add of single numbers: what a lane of registers gives
//   transpose(r)            kLanes registers as a square of numbers
//   pair(low, high)         of floats that are bfloat16: both in one register, 16 bits each. It only moves bits
//   unpair(r, low, high)    undoes it
//   sum(a, p)               p[k] = the sum of the lanes of a[k], for kGroup registers
//   kMostRows               and what adds value * x[column] of the next kLanes entries of a mask, in rows of `columns`
//                           entries of which the first ends at `end`:
//   add_in_two(indices, end, columns, ends, values, x, sum, row, disorder)
//                           if all lie in the first and the second row, else false. `row` gets the sums of the first;
//                           `ends` says that there are entries of the second, whose sums `sum` has then
//   add_in_rows(indices, end, columns, values, x, sum, rows)
//                           if all lie in the first kMostRows: `rows` gets the sums of each but the last, which are in
//                           `sum`, and the result is their number; else -1
//                           Indices in order fit int32. `disorder` gets a bit where one of kLanes + 1 of them does not
//                           increase; sums may be wrong then, but x is read in its columns only
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "../core/arithmetic.h"
#include "../core/width.h"

namespace shira::cpu {

template <typename T>
std::unique_ptr<T[], void (*)(T*)> allocate(int64_t count) {  // by lines: loading across two takes twice as long
  constexpr std::align_val_t kLine{64};
  return {static_cast<T*>(::operator new(count * sizeof(T), kLine)), [](T* p) { ::operator delete(p, kLine); }};
}

constexpr int kGroup = 8;  // entries whose sums run side by side: enough to hide the latency of a multiply-add

// The dtype is part of the type, since both 16-bit floats are uint16_t.
template <typename D>
struct Source {
  using Bits = typename D::Bits;
  const Bits* data;
};

namespace portable {

template <typename T>
struct Lanes {
  using Value = T;
  static constexpr int kLanes = 4, kSums = 8, kMostRows = kLanes;
  struct Register {
    T lane[kLanes];
  };
  template <typename D>
  static Register load(Source<D> from) {
    Register r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = static_cast<T>(D::load(from.data[i]));
    return r;
  }
  static Register load(const T* from) {
    Register r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = from[i];
    return r;
  }
  static void store(T* to, const Register& r) {
    for (int i = 0; i < kLanes; ++i) to[i] = r.lane[i];
  }
  static Register zero() { return Register{}; }
  static Register broadcast(T x) {
    Register r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = x;
    return r;
  }
  static Register add(const Register& a, const Register& b) {
    Register r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = a.lane[i] + b.lane[i];
    return r;
  }
  static Register multiply(const Register& a, const Register& b) {
    Register r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = a.lane[i] * b.lane[i];
    return r;
  }
  static Register multiply_add(const Register& a, const Register& b, Register sum) {
    for (int i = 0; i < kLanes; ++i) sum.lane[i] += a.lane[i] * b.lane[i];
    return sum;
  }
  static T fused(T a, T b, T sum) { return sum + a * b; }
  static void transpose(Register* r) {
    for (int i = 0; i < kLanes; ++i)
      for (int k = 0; k < i; ++k) std::swap(r[i].lane[k], r[k].lane[i]);
  }
  static Register pair(const Register& low, const Register& high) {
    Register r;
    for (int i = 0; i < kLanes; ++i)
      r.lane[i] = core::bits_to<T>(core::bits_to<uint32_t>(low.lane[i]) >> 16 | core::bits_to<uint32_t>(high.lane[i]));
    return r;
  }
  static void unpair(const Register& r, Register& low, Register& high) {
    for (int i = 0; i < kLanes; ++i) {
      const auto bits = core::bits_to<uint32_t>(r.lane[i]);
      low.lane[i] = core::bits_to<T>(bits << 16);
      high.lane[i] = core::bits_to<T>(bits & 0xFFFF0000u);
    }
  }
  static void sum(const Register* a, T* to) {
    for (int k = 0; k < kGroup; ++k) to[k] = (a[k].lane[0] + a[k].lane[1]) + (a[k].lane[2] + a[k].lane[3]);
  }
  template <typename D, typename I>
  static bool add_in_two(const I*, int64_t, int64_t, bool, Source<D>, const T*, Register&, T*, uint32_t&) {
    return false;  // one by one, as the caller does then, is as fast
  }
  template <typename D, typename I>
  static int add_in_rows(const I*, int64_t, int64_t, Source<D>, const T*, Register&, T*) {
    return -1;
  }
};
using Floats = Lanes<float>;
using Doubles = Lanes<double>;

}  // namespace portable

#if SHIRA_X86
namespace avx2 {

// The next indices, in 32 bits.
SHIRA_AVX2 inline __m128i four_indices(const int32_t* indices) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(indices));
}
SHIRA_AVX2 inline __m128i four_indices(const int64_t* indices) {
  const __m256i wide = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices));
  return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(wide, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6)));
}

// Bits where one of five indices does not increase.
SHIRA_AVX2 inline uint32_t four_in_disorder(const int32_t* indices) {
  return ~_mm_movemask_epi8(_mm_cmpgt_epi32(four_indices(indices + 1), four_indices(indices))) & 0xFFFF;
}
SHIRA_AVX2 inline uint32_t four_in_disorder(const int64_t* indices) {
  const __m256i one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices));
  const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices + 1));
  return ~_mm256_movemask_epi8(_mm256_cmpgt_epi64(next, one));
}

struct Floats {
  using Value = float;
  using Register = __m256;
  static constexpr int kLanes = 8, kSums = 8, kMostRows = kLanes;
  SHIRA_AVX2 static __m256 load(const float* from) { return _mm256_loadu_ps(from); }
  SHIRA_AVX2 static __m256 load(Source<core::Float32> from) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from.data));
  }
  SHIRA_AVX2 static __m256 load(Source<core::Float16> from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from.data)));
  }
  SHIRA_AVX2 static __m256 load(Source<core::BFloat16> from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from.data));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  SHIRA_AVX2 static void store(float* to, __m256 r) { _mm256_storeu_ps(to, r); }
  SHIRA_AVX2 static __m256 zero() { return _mm256_setzero_ps(); }
  SHIRA_AVX2 static __m256 broadcast(float x) { return _mm256_set1_ps(x); }
  SHIRA_AVX2 static __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
  SHIRA_AVX2 static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  SHIRA_AVX2 static float fused(float a, float b, float sum) { return __builtin_fmaf(a, b, sum); }
  SHIRA_AVX2 static __m256 multiply_add(__m256 a, __m256 b, __m256 sum) { return _mm256_fmadd_ps(a, b, sum); }
  SHIRA_AVX2 static void transpose(__m256* r) {
    __m256 s[8];
    for (int i = 0; i < 8; i += 2) {
      s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int k = 0; k < 2; ++k) {
        r[i + 2 * k] = _mm256_shuffle_ps(s[i + k], s[i + k + 2], 0x44);
        r[i + 2 * k + 1] = _mm256_shuffle_ps(s[i + k], s[i + k + 2], 0xEE);
      }
    }
    for (int i = 0; i < 4; ++i) {
      const __m256 low = r[i], high = r[i + 4];
      r[i] = _mm256_permute2f128_ps(low, high, 0x20);
      r[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
    }
  }
  SHIRA_AVX2 static __m256 pair(__m256 low, __m256 high) {
    return _mm256_or_ps(_mm256_castsi256_ps(_mm256_srli_epi32(_mm256_castps_si256(low), 16)), high);
  }
  SHIRA_AVX2 static void unpair(__m256 r, __m256& low, __m256& high) {
    low = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(r), 16));
    high = _mm256_and_ps(r, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int32_t>(0xFFFF0000))));
  }
  SHIRA_AVX2 static void sum(const __m256* a, float* to) {
    for (int k = 0; k < kGroup; k += 4) {
      const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a[k], a[k + 1]), _mm256_hadd_ps(a[k + 2], a[k + 3]));
      _mm_storeu_ps(to + k, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
    }
  }
  template <typename D, typename I>
  SHIRA_AVX2 static bool add_in_two(const I* indices, int64_t end, int64_t columns, bool ends, Source<D> values,
                                    const float* x, __m256& sum, float* row, uint32_t& disorder) {
    disorder |= four_in_disorder(indices) | four_in_disorder(indices + 4);
    const __m256i index = _mm256_setr_m128i(four_indices(indices), four_indices(indices + 4));
    const __m256i second = _mm256_sub_epi32(index, _mm256_set1_epi32(static_cast<int32_t>(end)));  // negative: first
    const __m256i first = _mm256_add_epi32(second, _mm256_set1_epi32(static_cast<int32_t>(columns)));
    const __m256i column = _mm256_min_epu32(first, second);  // a negative number is a large one here
    const __m256i last = _mm256_set1_epi32(static_cast<int32_t>(columns - 1));
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_min_epu32(column, last), column)) != -1) return false;
    const __m256 own = _mm256_i32gather_ps(x, column, 4), value = load(values);
    const __m256 in_first = _mm256_castsi256_ps(_mm256_srai_epi32(second, 31));
    sum = _mm256_blendv_ps(sum, _mm256_fmadd_ps(value, own, sum), in_first);
    store(row, sum);
    const __m256 others = _mm256_andnot_ps(in_first, _mm256_fmadd_ps(value, own, zero()));
    sum = _mm256_blendv_ps(sum, others, _mm256_castsi256_ps(_mm256_set1_epi32(-static_cast<int32_t>(ends))));
    return true;
  }
  template <typename D, typename I>
  SHIRA_AVX2 static int add_in_rows(const I* indices, int64_t end, int64_t columns, Source<D> values, const float* x,
                                    __m256& sum, float* rows) {
    const __m256i wide = _mm256_set1_epi32(static_cast<int32_t>(columns)),
                  last = _mm256_sub_epi32(wide, _mm256_set1_epi32(1));
    __m256i next = _mm256_sub_epi32(_mm256_setr_m128i(four_indices(indices), four_indices(indices + 4)),
                                    _mm256_set1_epi32(static_cast<int32_t>(end)));
    __m256i column = _mm256_add_epi32(next, wide);
    int row = 0;
    for (; _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_min_epu32(column, last), column)) != -1; ++row) {
      if (row == kMostRows) return -1;
      column = _mm256_min_epu32(column, _mm256_sub_epi32(column, wide));
    }
    const __m256 own = _mm256_i32gather_ps(x, column, 4), value = load(values);
    __m256i left = _mm256_set1_epi32(-1);
    for (row = 0;; ++row) {
      const __m256i here = _mm256_and_si256(left, _mm256_srai_epi32(next, 31));
      sum = _mm256_blendv_ps(sum, _mm256_fmadd_ps(value, own, sum), _mm256_castsi256_ps(here));
      left = _mm256_andnot_si256(here, left);
      if (_mm256_movemask_epi8(left) == 0) return row;
      store(rows + row * kLanes, sum);
      sum = zero();
      next = _mm256_sub_epi32(next, wide);
    }
  }
};

struct Doubles {
  using Value = double;
  using Register = __m256d;
  static constexpr int kLanes = 4, kSums = 8, kMostRows = kLanes;
  SHIRA_AVX2 static __m256d load(const double* from) { return _mm256_loadu_pd(from); }
  SHIRA_AVX2 static __m256d load(Source<core::Float64> from) {
    return _mm256_loadu_pd(reinterpret_cast<const double*>(from.data));
  }
  SHIRA_AVX2 static __m256d load(Source<core::Float32> from) {
    return _mm256_cvtps_pd(_mm_loadu_ps(reinterpret_cast<const float*>(from.data)));
  }
  SHIRA_AVX2 static void store(double* to, __m256d r) { _mm256_storeu_pd(to, r); }
  SHIRA_AVX2 static __m256d zero() { return _mm256_setzero_pd(); }
  SHIRA_AVX2 static __m256d broadcast(double x) { return _mm256_set1_pd(x); }
  SHIRA_AVX2 static __m256d add(__m256d a, __m256d b) { return _mm256_add_pd(a, b); }
  SHIRA_AVX2 static __m256d multiply(__m256d a, __m256d b) { return _mm256_mul_pd(a, b); }
  SHIRA_AVX2 static double fused(double a, double b, double sum) { return __builtin_fma(a, b, sum); }
  SHIRA_AVX2 static __m256d multiply_add(__m256d a, __m256d b, __m256d sum) { return _mm256_fmadd_pd(a, b, sum); }
  SHIRA_AVX2 static void transpose(__m256d* r) {
    const __m256d a = _mm256_unpacklo_pd(r[0], r[1]), b = _mm256_unpackhi_pd(r[0], r[1]);
    const __m256d c = _mm256_unpacklo_pd(r[2], r[3]), d = _mm256_unpackhi_pd(r[2], r[3]);
    r[0] = _mm256_permute2f128_pd(a, c, 0x20);
    r[1] = _mm256_permute2f128_pd(b, d, 0x20);
    r[2] = _mm256_permute2f128_pd(a, c, 0x31);
    r[3] = _mm256_permute2f128_pd(b, d, 0x31);
  }
  SHIRA_AVX2 static void sum(const __m256d* a, double* to) {
    for (int k = 0; k < kGroup; k += 2) {
      const __m256d pairs = _mm256_hadd_pd(a[k], a[k + 1]);
      _mm_storeu_pd(to + k, _mm_add_pd(_mm256_castpd256_pd128(pairs), _mm256_extractf128_pd(pairs, 1)));
    }
  }
  template <typename D, typename I>
  SHIRA_AVX2 static bool add_in_two(const I* indices, int64_t end, int64_t columns, bool ends, Source<D> values,
                                    const double* x, __m256d& sum, double* row, uint32_t& disorder) {
    disorder |= four_in_disorder(indices);
    const __m128i second = _mm_sub_epi32(four_indices(indices), _mm_set1_epi32(static_cast<int32_t>(end)));
    const __m128i first = _mm_add_epi32(second, _mm_set1_epi32(static_cast<int32_t>(columns)));
    const __m128i column = _mm_min_epu32(first, second);
    const __m128i last = _mm_set1_epi32(static_cast<int32_t>(columns - 1));
    if (_mm_movemask_epi8(_mm_cmpeq_epi32(_mm_min_epu32(column, last), column)) != 0xFFFF) return false;
    const __m256d own = _mm256_i32gather_pd(x, column, 8), value = load(values);
    const __m256d in_first = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm_srai_epi32(second, 31)));
    sum = _mm256_blendv_pd(sum, _mm256_fmadd_pd(value, own, sum), in_first);
    store(row, sum);
    const __m256d others = _mm256_andnot_pd(in_first, _mm256_fmadd_pd(value, own, zero()));
    sum = _mm256_blendv_pd(sum, others, _mm256_castsi256_pd(_mm256_set1_epi64x(-static_cast<int64_t>(ends))));
    return true;
  }
  template <typename D, typename I>
  SHIRA_AVX2 static int add_in_rows(const I* indices, int64_t end, int64_t columns, Source<D> values, const double* x,
                                    __m256d& sum, double* rows) {
    const __m128i wide = _mm_set1_epi32(static_cast<int32_t>(columns)), last = _mm_sub_epi32(wide, _mm_set1_epi32(1));
    __m128i next = _mm_sub_epi32(four_indices(indices), _mm_set1_epi32(static_cast<int32_t>(end)));
    __m128i column = _mm_add_epi32(next, wide);
    int row = 0;
    for (; _mm_movemask_epi8(_mm_cmpeq_epi32(_mm_min_epu32(column, last), column)) != 0xFFFF; ++row) {
      if (row == kMostRows) return -1;
      column = _mm_min_epu32(column, _mm_sub_epi32(column, wide));
    }
    const __m256d own = _mm256_i32gather_pd(x, column, 8), value = load(values);
    __m128i left = _mm_set1_epi32(-1);
    for (row = 0;; ++row) {
      const __m128i here = _mm_and_si128(left, _mm_srai_epi32(next, 31));
      sum = _mm256_blendv_pd(sum, _mm256_fmadd_pd(value, own, sum), _mm256_castsi256_pd(_mm256_cvtepi32_epi64(here)));
      left = _mm_andnot_si128(here, left);
      if (_mm_movemask_epi8(left) == 0) return row;
      store(rows + row * kLanes, sum);
      sum = zero();
      next = _mm_sub_epi32(next, wide);
    }
  }
};

}  // namespace avx2

namespace avx512 {

// The next indices, in 32 bits.
SHIRA_AVX512 inline __m256i eight_indices(const int32_t* indices) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices));
}
SHIRA_AVX512 inline __m256i eight_indices(const int64_t* indices) {
  return _mm512_cvtepi64_epi32(_mm512_loadu_si512(indices));
}
SHIRA_AVX512 inline __m512i sixteen_indices(const int32_t* indices) { return _mm512_loadu_si512(indices); }
SHIRA_AVX512 inline __m512i sixteen_indices(const int64_t* indices) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(eight_indices(indices)), eight_indices(indices + 8), 1);
}

// Bits where one of nine or seventeen indices does not increase.
SHIRA_AVX512 inline uint32_t eight_in_disorder(const int32_t* indices) {
  return _mm256_cmpge_epi32_mask(eight_indices(indices), eight_indices(indices + 1));
}
SHIRA_AVX512 inline uint32_t eight_in_disorder(const int64_t* indices) {
  return _mm512_cmpge_epi64_mask(_mm512_loadu_si512(indices), _mm512_loadu_si512(indices + 1));
}
SHIRA_AVX512 inline uint32_t sixteen_in_disorder(const int32_t* indices) {
  return _mm512_cmpge_epi32_mask(sixteen_indices(indices), sixteen_indices(indices + 1));
}
SHIRA_AVX512 inline uint32_t sixteen_in_disorder(const int64_t* indices) {
  return eight_in_disorder(indices) | eight_in_disorder(indices + 8);
}

struct Floats {
  using Value = float;
  using Register = __m512;
  static constexpr int kLanes = 16, kSums = 16, kMostRows = kLanes;
  SHIRA_AVX512 static __m512 load(const float* from) { return _mm512_loadu_ps(from); }
  SHIRA_AVX512 static __m512 load(Source<core::Float32> from) { return _mm512_loadu_ps(from.data); }
  SHIRA_AVX512 static __m512 load(Source<core::Float16> from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.data)));
  }
  SHIRA_AVX512 static __m512 load(Source<core::BFloat16> from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from.data));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  SHIRA_AVX512 static void store(float* to, __m512 r) { _mm512_storeu_ps(to, r); }
  SHIRA_AVX512 static __m512 zero() { return _mm512_setzero_ps(); }
  SHIRA_AVX512 static __m512 broadcast(float x) { return _mm512_set1_ps(x); }
  SHIRA_AVX512 static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  SHIRA_AVX512 static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  SHIRA_AVX512 static float fused(float a, float b, float sum) { return __builtin_fmaf(a, b, sum); }
  SHIRA_AVX512 static __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
  SHIRA_AVX512 static void transpose(__m512* r) {
    __m512 s[16];
    for (int i = 0; i < 16; i += 2) {
      s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int k = 0; k < 2; ++k) {
        r[i + 2 * k] = _mm512_shuffle_ps(s[i + k], s[i + k + 2], 0x44);
        r[i + 2 * k + 1] = _mm512_shuffle_ps(s[i + k], s[i + k + 2], 0xEE);
      }
    }
    // Now lane group g of r[4 * i + k] holds column 4 * g + k of rows 4 * i to 4 * i + 3: transpose the groups.
    for (int k = 0; k < 4; ++k) {
      const __m512 low0 = _mm512_shuffle_f32x4(r[k], r[k + 4], 0x44),
                   high0 = _mm512_shuffle_f32x4(r[k], r[k + 4], 0xEE);
      const __m512 low1 = _mm512_shuffle_f32x4(r[k + 8], r[k + 12], 0x44);
      const __m512 high1 = _mm512_shuffle_f32x4(r[k + 8], r[k + 12], 0xEE);
      r[k] = _mm512_shuffle_f32x4(low0, low1, 0x88);
      r[k + 4] = _mm512_shuffle_f32x4(low0, low1, 0xDD);
      r[k + 8] = _mm512_shuffle_f32x4(high0, high1, 0x88);
      r[k + 12] = _mm512_shuffle_f32x4(high0, high1, 0xDD);
    }
  }
  SHIRA_AVX512 static __m512 pair(__m512 low, __m512 high) {
    return _mm512_or_ps(_mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(low), 16)), high);
  }
  SHIRA_AVX512 static void unpair(__m512 r, __m512& low, __m512& high) {
    low = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(r), 16));
    high = _mm512_and_ps(r, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000))));
  }
  SHIRA_AVX512 static void sum(const __m512* a, float* to) {
    __m512 half[4], quarter[2];
    for (int k = 0; k < 4; ++k)  // adds the upper half of each of two registers to its lower half
      half[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * k], a[2 * k + 1], 0x44),
                              _mm512_shuffle_f32x4(a[2 * k], a[2 * k + 1], 0xEE));
    for (int k = 0; k < 2; ++k)
      quarter[k] = _mm512_add_ps(_mm512_shuffle_f32x4(half[2 * k], half[2 * k + 1], 0x88),
                                 _mm512_shuffle_f32x4(half[2 * k], half[2 * k + 1], 0xDD));
    const __m512 pairs =
        _mm512_add_ps(_mm512_shuffle_ps(quarter[0], quarter[1], 0x88), _mm512_shuffle_ps(quarter[0], quarter[1], 0xDD));
    const __m512 sums = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xB1));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums)));
  }
  template <typename D, typename I>
  SHIRA_AVX512 static bool add_in_two(const I* indices, int64_t end, int64_t columns, bool ends, Source<D> values,
                                      const float* x, __m512& sum, float* row, uint32_t& disorder) {
    disorder |= sixteen_in_disorder(indices);
    const __m512i wide = _mm512_set1_epi32(static_cast<int32_t>(columns));
    const __m512i second = _mm512_sub_epi32(sixteen_indices(indices), _mm512_set1_epi32(static_cast<int32_t>(end)));
    const __m512i first = _mm512_add_epi32(second, wide);
    const __m512i column = _mm512_min_epu32(first, second);  // a negative number is a large one here
    if (_mm512_cmplt_epu32_mask(column, wide) != 0xFFFF) return false;
    const __mmask16 in_first = _mm512_cmplt_epu32_mask(first, wide);
    const __m512 own = _mm512_i32gather_ps(column, x, 4), value = load(values);
    sum = _mm512_mask3_fmadd_ps(value, own, sum, in_first);
    store(row, sum);
    const __m512 others = _mm512_maskz_fmadd_ps(_knot_mask16(in_first), value, own, zero());
    sum = _mm512_mask_mov_ps(sum, static_cast<__mmask16>(-static_cast<int>(ends)), others);
    return true;
  }
  template <typename D, typename I>
  SHIRA_AVX512 static int add_in_rows(const I* indices, int64_t end, int64_t columns, Source<D> values, const float* x,
                                      __m512& sum, float* rows) {
    const __m512i wide = _mm512_set1_epi32(static_cast<int32_t>(columns));
    __m512i next = _mm512_sub_epi32(sixteen_indices(indices), _mm512_set1_epi32(static_cast<int32_t>(end)));
    __m512i column = _mm512_add_epi32(next, wide);
    int row = 0;
    for (; _mm512_cmplt_epu32_mask(column, wide) != 0xFFFF; ++row) {
      if (row == kMostRows) return -1;
      column = _mm512_min_epu32(column, _mm512_sub_epi32(column, wide));
    }
    const __m512 own = _mm512_i32gather_ps(column, x, 4), value = load(values);
    __mmask16 left = 0xFFFF;
    for (row = 0;; ++row) {
      const __mmask16 here = left & _mm512_movepi32_mask(next);
      sum = _mm512_mask3_fmadd_ps(value, own, sum, here);
      left ^= here;
      if (left == 0) return row;
      store(rows + row * kLanes, sum);
      sum = zero();
      next = _mm512_sub_epi32(next, wide);
    }
  }
};

struct Doubles {
  using Value = double;
  using Register = __m512d;
  static constexpr int kLanes = 8, kSums = 16, kMostRows = kLanes;
  SHIRA_AVX512 static __m512d load(const double* from) { return _mm512_loadu_pd(from); }
  SHIRA_AVX512 static __m512d load(Source<core::Float64> from) { return _mm512_loadu_pd(from.data); }
  SHIRA_AVX512 static __m512d load(Source<core::Float32> from) {
    return _mm512_cvtps_pd(_mm256_loadu_ps(reinterpret_cast<const float*>(from.data)));
  }
  SHIRA_AVX512 static void store(double* to, __m512d r) { _mm512_storeu_pd(to, r); }
  SHIRA_AVX512 static __m512d zero() { return _mm512_setzero_pd(); }
  SHIRA_AVX512 static __m512d broadcast(double x) { return _mm512_set1_pd(x); }
  SHIRA_AVX512 static __m512d add(__m512d a, __m512d b) { return _mm512_add_pd(a, b); }
  SHIRA_AVX512 static __m512d multiply(__m512d a, __m512d b) { return _mm512_mul_pd(a, b); }
  SHIRA_AVX512 static double fused(double a, double b, double sum) { return __builtin_fma(a, b, sum); }
  SHIRA_AVX512 static __m512d multiply_add(__m512d a, __m512d b, __m512d sum) { return _mm512_fmadd_pd(a, b, sum); }
  SHIRA_AVX512 static void transpose(__m512d* r) {
    __m512d s[8];
    for (int i = 0; i < 8; i += 2) {
      s[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
      s[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
    }
    for (int k = 0; k < 2; ++k) {
      const __m512d low0 = _mm512_shuffle_f64x2(s[k], s[k + 2], 0x44),
                    high0 = _mm512_shuffle_f64x2(s[k], s[k + 2], 0xEE);
      const __m512d low1 = _mm512_shuffle_f64x2(s[k + 4], s[k + 6], 0x44);
      const __m512d high1 = _mm512_shuffle_f64x2(s[k + 4], s[k + 6], 0xEE);
      r[k] = _mm512_shuffle_f64x2(low0, low1, 0x88);
      r[k + 2] = _mm512_shuffle_f64x2(low0, low1, 0xDD);
      r[k + 4] = _mm512_shuffle_f64x2(high0, high1, 0x88);
      r[k + 6] = _mm512_shuffle_f64x2(high0, high1, 0xDD);
    }
  }
  SHIRA_AVX512 static void sum(const __m512d* a, double* to) {
    __m512d half[4], quarter[2];
    for (int k = 0; k < 4; ++k)
      half[k] = _mm512_add_pd(_mm512_shuffle_f64x2(a[2 * k], a[2 * k + 1], 0x44),
                              _mm512_shuffle_f64x2(a[2 * k], a[2 * k + 1], 0xEE));
    for (int k = 0; k < 2; ++k)
      quarter[k] = _mm512_add_pd(_mm512_shuffle_f64x2(half[2 * k], half[2 * k + 1], 0x88),
                                 _mm512_shuffle_f64x2(half[2 * k], half[2 * k + 1], 0xDD));
    const __m512d sums =
        _mm512_add_pd(_mm512_unpacklo_pd(quarter[0], quarter[1]), _mm512_unpackhi_pd(quarter[0], quarter[1]));
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_pd(to, _mm512_permutexvar_pd(order, sums));
  }
  template <typename D, typename I>
  SHIRA_AVX512 static bool add_in_two(const I* indices, int64_t end, int64_t columns, bool ends, Source<D> values,
                                      const double* x, __m512d& sum, double* row, uint32_t& disorder) {
    disorder |= eight_in_disorder(indices);
    const __m256i wide = _mm256_set1_epi32(static_cast<int32_t>(columns));
    const __m256i second = _mm256_sub_epi32(eight_indices(indices), _mm256_set1_epi32(static_cast<int32_t>(end)));
    const __m256i first = _mm256_add_epi32(second, wide);
    const __m256i column = _mm256_min_epu32(first, second);
    if (_mm256_cmplt_epu32_mask(column, wide) != 0xFF) return false;
    const __mmask8 in_first = _mm256_cmplt_epu32_mask(first, wide);
    const __m512d own = _mm512_i32gather_pd(column, x, 8), value = load(values);
    sum = _mm512_mask3_fmadd_pd(value, own, sum, in_first);
    store(row, sum);
    const __m512d others = _mm512_maskz_fmadd_pd(_knot_mask8(in_first), value, own, zero());
    sum = _mm512_mask_mov_pd(sum, static_cast<__mmask8>(-static_cast<int>(ends)), others);
    return true;
  }
  template <typename D, typename I>
  SHIRA_AVX512 static int add_in_rows(const I* indices, int64_t end, int64_t columns, Source<D> values, const double* x,
                                      __m512d& sum, double* rows) {
    const __m256i wide = _mm256_set1_epi32(static_cast<int32_t>(columns));
    __m256i next = _mm256_sub_epi32(eight_indices(indices), _mm256_set1_epi32(static_cast<int32_t>(end)));
    __m256i column = _mm256_add_epi32(next, wide);
    int row = 0;
    for (; _mm256_cmplt_epu32_mask(column, wide) != 0xFF; ++row) {
      if (row == kMostRows) return -1;
      column = _mm256_min_epu32(column, _mm256_sub_epi32(column, wide));
    }
    const __m512d own = _mm512_i32gather_pd(column, x, 8), value = load(values);
    __mmask8 left = 0xFF;
    for (row = 0;; ++row) {
      const __mmask8 here = left & _mm256_movepi32_mask(next);
      sum = _mm512_mask3_fmadd_pd(value, own, sum, here);
      left ^= here;
      if (left == 0) return row;
      store(rows + row * kLanes, sum);
      sum = zero();
      next = _mm256_sub_epi32(next, wide);
    }
  }
};

}  // namespace avx512
#endif

}  // namespace shira::cpu
