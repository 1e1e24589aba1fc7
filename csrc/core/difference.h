// Where two buffers of equal length differ. Entries are compared by their bits: NaNs with different payloads differ,
// and so do 0.0 and -0.0.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "arithmetic.h"
#include "width.h"

namespace shira::core {

namespace detail {
template <typename Unit>
inline Unit unit_at(const uint8_t* data, int64_t i) {
  Unit value;
  memcpy(&value, data + i * static_cast<int64_t>(sizeof(Unit)), sizeof(Unit));
  return value;
}
}  // namespace detail

// How many entries of [begin, end) differ.
template <typename Unit>
inline int64_t count_differing(const uint8_t* one, const uint8_t* two, int64_t begin, int64_t end) {
  int64_t found = 0;
  for (int64_t i = begin; i < end;) {
    // In short runs, so that the compiler can count in narrow lanes.
    const int64_t stop = end - i < 128 ? end : i + 128;
    uint8_t some = 0;
    for (; i < stop; ++i)
      some = static_cast<uint8_t>(some + (detail::unit_at<Unit>(one, i) != detail::unit_at<Unit>(two, i)));
    found += some;
  }
  return found;
}

// A line of 64 bytes: one bit per entry, set if it differs.
#if SHIRA_X86
template <typename Unit>
SHIRA_AVX512 inline uint64_t line_avx512(const uint8_t* one, const uint8_t* two) {
  const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(two);
  if constexpr (sizeof(Unit) == 1) return _mm512_cmpneq_epi8_mask(a, b);
  if constexpr (sizeof(Unit) == 2) return _mm512_cmpneq_epi16_mask(a, b);
  if constexpr (sizeof(Unit) == 4) return _mm512_cmpneq_epi32_mask(a, b);
  return _mm512_cmpneq_epi64_mask(a, b);
}

template <typename Unit>
SHIRA_AVX2 inline uint64_t line_avx2(const uint8_t* one, const uint8_t* two) {
  uint64_t same = 0;
  __m256i equal[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(one + 32 * half));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(two + 32 * half));
    if constexpr (sizeof(Unit) == 1) equal[half] = _mm256_cmpeq_epi8(a, b);
    if constexpr (sizeof(Unit) == 2) equal[half] = _mm256_cmpeq_epi16(a, b);
    if constexpr (sizeof(Unit) == 4) equal[half] = _mm256_cmpeq_epi32(a, b);
    if constexpr (sizeof(Unit) == 8) equal[half] = _mm256_cmpeq_epi64(a, b);
  }
  const auto bits = [](uint64_t low, uint64_t high, int width) { return low | high << width; };
  if constexpr (sizeof(Unit) == 1)
    same = bits(static_cast<uint32_t>(_mm256_movemask_epi8(equal[0])),
                static_cast<uint32_t>(_mm256_movemask_epi8(equal[1])), 32);
  if constexpr (sizeof(Unit) == 2) {
    // The pack interleaves the halves of its arguments; the permutation puts them in order.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(equal[0], equal[1]), 0xD8);
    same = static_cast<uint32_t>(_mm256_movemask_epi8(packed));
  }
  if constexpr (sizeof(Unit) == 4)
    same = bits(static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal[0]))),
                static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(equal[1]))), 8);
  if constexpr (sizeof(Unit) == 8)
    same = bits(static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(equal[0]))),
                static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(equal[1]))), 4);
  constexpr int kEntries = 64 / sizeof(Unit);
  return ~same & (~uint64_t{0} >> (64 - kEntries));
}
#endif

template <typename Unit>
inline uint64_t line_portable(const uint8_t* one, const uint8_t* two) {
  uint64_t any = 0, bits = 0;
  for (int64_t w = 0; w < 8; ++w) any |= detail::unit_at<uint64_t>(one, w) ^ detail::unit_at<uint64_t>(two, w);
  if (any == 0) return 0;
  for (int64_t k = 0; k < static_cast<int64_t>(64 / sizeof(Unit)); ++k)
    bits |= static_cast<uint64_t>(detail::unit_at<Unit>(one, k) != detail::unit_at<Unit>(two, k)) << k;
  return bits;
}

// Writes the bits of a line as entry numbers. Most lines have none or one: those take no branch.
inline int64_t put_line(uint64_t bits, int64_t at, int64_t found, int32_t* out) {
  out[found] = static_cast<int32_t>(at + __builtin_ctzll(bits | uint64_t{1} << 63));
  found += bits != 0;
  for (bits &= bits - 1; bits != 0; bits &= bits - 1) out[found++] = static_cast<int32_t>(at + __builtin_ctzll(bits));
  return found;
}

#if SHIRA_X86
template <typename Unit>
SHIRA_AVX512 inline int64_t lines_avx512(const uint8_t* one, const uint8_t* two, int64_t lines, int32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < lines; ++i)
    found = put_line(line_avx512<Unit>(one + 64 * i, two + 64 * i), i * static_cast<int64_t>(64 / sizeof(Unit)), found,
                     out);
  return found;
}
template <typename Unit>
SHIRA_AVX2 inline int64_t lines_avx2(const uint8_t* one, const uint8_t* two, int64_t lines, int32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < lines; ++i)
    found =
        put_line(line_avx2<Unit>(one + 64 * i, two + 64 * i), i * static_cast<int64_t>(64 / sizeof(Unit)), found, out);
  return found;
}
#endif
template <typename Unit>
inline int64_t lines_portable(const uint8_t* one, const uint8_t* two, int64_t lines, int32_t* out) {
  int64_t found = 0;
  for (int64_t i = 0; i < lines; ++i)
    found = put_line(line_portable<Unit>(one + 64 * i, two + 64 * i), i * static_cast<int64_t>(64 / sizeof(Unit)),
                     found, out);
  return found;
}

// Writes the entries of [begin, end) that differ, counted from `begin`. `out` has room for all; returns how many.
template <typename Unit>
inline int64_t differing(const uint8_t* one, const uint8_t* two, int64_t begin, int64_t end, int32_t* out,
                         Width width = widest()) {
  constexpr int64_t kLine = 64 / sizeof(Unit);
  const uint8_t *a = one + begin * static_cast<int64_t>(sizeof(Unit)),
                *b = two + begin * static_cast<int64_t>(sizeof(Unit));
  const int64_t lines = (end - begin) / kLine;
  int64_t found = 0;
#if SHIRA_X86
  if (width == Width::Avx512) found = lines_avx512<Unit>(a, b, lines, out);
  if (width == Width::Avx2) found = lines_avx2<Unit>(a, b, lines, out);
#endif
  if (width == Width::Portable) found = lines_portable<Unit>(a, b, lines, out);
  for (int64_t k = lines * kLine; k < end - begin; ++k) {
    out[found] = static_cast<int32_t>(k);
    found += detail::unit_at<Unit>(a, k) != detail::unit_at<Unit>(b, k);
  }
  return found;
}

// How far apart two buffers of floats are, granule by granule: the sum of |two - one| in entry order, as the integer
// with the same bits, its rank. Sums are never negative, so ranks sort like them; NaN counts as infinitely far.
template <typename F>
struct Ranks {
  using Rank = typename F::Bits;
  using Number = typename F::Compute;
  using Wide = std::conditional_t<sizeof(Number) == 8, uint64_t, uint32_t>;
  static constexpr int kBits = 8 * sizeof(Wide);
  static constexpr int64_t kBlock = 1024;

  const uint8_t *one, *two;
  int64_t granule;

  static Number infinity() {
    return bits_to<Number>(static_cast<Wide>(sizeof(Wide) == 8 ? 0x7FFull << 52 : 0xFFull << 23));
  }

  Number step(int64_t i) const {
    return static_cast<Number>(F::load(detail::unit_at<Rank>(two, i))) -
           static_cast<Number>(F::load(detail::unit_at<Rank>(one, i)));
  }

  // The ranks of granules [begin, end), at most a block of them.
  void read(int64_t begin, int64_t end, Wide* out) const {
    const Wide sign = Wide{1} << (kBits - 1), most = bits_to<Wide>(infinity());
    if (granule == 1) {
      for (int64_t i = begin; i < end; ++i) {
        const Wide rank = bits_to<Wide>(step(i)) & ~sign;
        out[i - begin] = rank < most ? rank : most;
      }
      return;
    }
    for (int64_t i = begin; i < end; ++i) {
      Number sum = 0;
      for (int64_t k = i * granule; k < (i + 1) * granule; ++k) {
        const Number d = step(k);
        sum += d < 0 ? -d : d;
      }
      const Wide rank = bits_to<Wide>(sum) & ~sign;
      out[i - begin] = rank < most ? rank : most;
    }
  }

  // Counts 16 bits of each rank, from bit `shift` on, among the ranks whose bits above them are `last`.
  void count(int64_t granules, int shift, uint64_t last, int64_t* histogram) const {
    Wide ranks[kBlock];
    for (int64_t begin = 0; begin < granules; begin += kBlock) {
      const int64_t n = granules - begin < kBlock ? granules - begin : kBlock;
      read(begin, begin + n, ranks);
      if (shift + 16 == kBits) {
        for (int64_t i = 0; i < n; ++i) ++histogram[ranks[i] >> shift];
      } else {
        for (int64_t i = 0; i < n; ++i)
          if (ranks[i] >> (shift + 16) == last) ++histogram[ranks[i] >> shift & 0xFFFF];
      }
    }
  }

  // Calls `above` with each granule whose rank is above `last`, and `equal` with each whose rank is `last`.
  template <typename Above, typename Equal>
  void take(int64_t granules, uint64_t last, const Above& above, const Equal& equal) const {
    Wide ranks[kBlock];
    for (int64_t begin = 0; begin < granules; begin += kBlock) {
      const int64_t n = granules - begin < kBlock ? granules - begin : kBlock;
      read(begin, begin + n, ranks);
      for (int64_t i = 0; i < n; ++i) {
        if (ranks[i] < last) continue;
        if (ranks[i] == last)
          equal(begin + i);
        else
          above(begin + i);
      }
    }
  }

  // The sum of the squared differences, leaving out those that are NaN or infinite.
  double squares(int64_t entries) const {
    double lanes[8] = {};
    int64_t i = 0;
    const auto square = [&](int64_t k) {
      const double d = static_cast<double>(step(k)), s = d * d;
      return s - s == 0 ? s : 0.0;  // s - s is NaN where s is NaN or infinite
    };
    for (; i + 8 <= entries; i += 8)
      for (int64_t k = 0; k < 8; ++k) lanes[k] += square(i + k);
    for (; i < entries; ++i) lanes[0] += square(i);
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
  }
};

}  // namespace shira::core
