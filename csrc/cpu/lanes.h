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
//   add_entries(indices, start, columns, values, x, sum)
//                           adds value * x[column] of the next kLanes entries, as far as they lie in the row whose
//                           `columns` entries begin at `start`, and returns how many do. Indices increase from `start`
//                           on and are at most kNoEntry
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

constexpr int64_t kNoEntry = std::numeric_limits<int32_t>::max();

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
  static constexpr int kLanes = 4, kSums = 8;
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
  static int64_t add_entries(const I* indices, int64_t start, int64_t columns, Source<D> values, const T* x,
                             Register& sum) {
    int here = 0;
    for (; here < kLanes && int64_t{indices[here]} - start < columns; ++here)
      sum.lane[here] += static_cast<T>(D::load(values.data[here])) * x[int64_t{indices[here]} - start];
    return here;
  }
};
using Floats = Lanes<float>;
using Doubles = Lanes<double>;

}  // namespace portable

#if SHIRA_X86
namespace avx2 {

// The columns of the next indices in a row.
SHIRA_AVX2 inline __m128i four_columns(const int32_t* indices, int64_t start) {
  return _mm_sub_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(indices)),
                       _mm_set1_epi32(static_cast<int32_t>(start)));
}
SHIRA_AVX2 inline __m128i four_columns(const int64_t* indices, int64_t start) {
  const __m256i wide = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices));
  const __m256i narrow = _mm256_permutevar8x32_epi32(wide, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  return _mm_sub_epi32(_mm256_castsi256_si128(narrow), _mm_set1_epi32(static_cast<int32_t>(start)));
}

struct Floats {
  using Value = float;
  using Register = __m256;
  static constexpr int kLanes = 8, kSums = 8;
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
  SHIRA_AVX2 static int64_t add_entries(const I* indices, int64_t start, int64_t columns, Source<D> values,
                                        const float* x, __m256& sum) {
    const __m256i column = _mm256_setr_m128i(four_columns(indices, start), four_columns(indices + 4, start));
    const __m256i most = _mm256_set1_epi32(static_cast<int32_t>(std::min(columns, kNoEntry)));
    const __m256 here = _mm256_castsi256_ps(_mm256_cmpgt_epi32(most, column));
    const __m256 own = _mm256_mask_i32gather_ps(zero(), x, column, here, 4);
    sum = _mm256_blendv_ps(sum, _mm256_fmadd_ps(load(values), own, sum), here);
    return __builtin_popcount(_mm256_movemask_ps(here));
  }
};

struct Doubles {
  using Value = double;
  using Register = __m256d;
  static constexpr int kLanes = 4, kSums = 8;
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
  SHIRA_AVX2 static int64_t add_entries(const I* indices, int64_t start, int64_t columns, Source<D> values,
                                        const double* x, __m256d& sum) {
    const __m128i column = four_columns(indices, start);
    const __m128i most = _mm_set1_epi32(static_cast<int32_t>(std::min(columns, kNoEntry)));
    const __m256d here = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm_cmpgt_epi32(most, column)));
    const __m256d own = _mm256_mask_i32gather_pd(zero(), x, column, here, 8);
    sum = _mm256_blendv_pd(sum, _mm256_fmadd_pd(load(values), own, sum), here);
    return __builtin_popcount(_mm256_movemask_pd(here));
  }
};

}  // namespace avx2

namespace avx512 {

// The columns of the next indices in a row.
SHIRA_AVX512 inline __m256i eight_columns(const int32_t* indices, int64_t start) {
  return _mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices)),
                          _mm256_set1_epi32(static_cast<int32_t>(start)));
}
SHIRA_AVX512 inline __m256i eight_columns(const int64_t* indices, int64_t start) {
  return _mm512_cvtepi64_epi32(_mm512_sub_epi64(_mm512_loadu_si512(indices), _mm512_set1_epi64(start)));
}
SHIRA_AVX512 inline __m512i sixteen_columns(const int32_t* indices, int64_t start) {
  return _mm512_sub_epi32(_mm512_loadu_si512(indices), _mm512_set1_epi32(static_cast<int32_t>(start)));
}
SHIRA_AVX512 inline __m512i sixteen_columns(const int64_t* indices, int64_t start) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(eight_columns(indices, start)), eight_columns(indices + 8, start),
                            1);
}

struct Floats {
  using Value = float;
  using Register = __m512;
  static constexpr int kLanes = 16, kSums = 16;
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
  SHIRA_AVX512 static int64_t add_entries(const I* indices, int64_t start, int64_t columns, Source<D> values,
                                          const float* x, __m512& sum) {
    const __m512i column = sixteen_columns(indices, start);
    const __m512i most = _mm512_set1_epi32(static_cast<int32_t>(std::min(columns, kNoEntry)));
    const __mmask16 here = _mm512_cmplt_epu32_mask(column, most);
    const __m512 own = _mm512_mask_i32gather_ps(zero(), here, column, x, 4);
    sum = _mm512_mask3_fmadd_ps(load(values), own, sum, here);
    return __builtin_popcount(here);
  }
};

struct Doubles {
  using Value = double;
  using Register = __m512d;
  static constexpr int kLanes = 8, kSums = 16;
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
  SHIRA_AVX512 static int64_t add_entries(const I* indices, int64_t start, int64_t columns, Source<D> values,
                                          const double* x, __m512d& sum) {
    const __m256i column = eight_columns(indices, start);
    const __m256i most = _mm256_set1_epi32(static_cast<int32_t>(std::min(columns, kNoEntry)));
    const __mmask8 here = _mm256_cmplt_epu32_mask(column, most);
    const __m512d own = _mm512_mask_i32gather_pd(zero(), here, column, x, 8);
    sum = _mm512_mask3_fmadd_pd(load(values), own, sum, here);
    return __builtin_popcount(here);
  }
};

}  // namespace avx512
#endif

}  // namespace shira::cpu
