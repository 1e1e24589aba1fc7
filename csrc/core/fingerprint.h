// The fingerprint of a tensor: the sum mod 2^64, over its bytes as little-endian 64-bit words (the last one
// padded with zeros), of splitmix64(word ^ position * kGolden). A sum, so any order of words gives the same
// bits, and the words that changed can be replaced in it: new = old - at(before) + at(after).
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "splitmix.h"
#include "width.h"

namespace shira::core {

constexpr int64_t kWordBytes = 8;
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read in the machine's own order");

SHIRA_HD int64_t word_count(int64_t bytes) { return bytes / kWordBytes + (bytes % kWordBytes != 0); }

SHIRA_HD uint64_t mix_word(uint64_t word, uint64_t position) { return splitmix64(word ^ (position * kGolden)); }

// Where the words of a part of a larger tensor are in it: runs of `run` words lie together there, the first one at word
// `first`, and each `stride` words after the one before.
struct Placing {
  int64_t first, run, stride;

  SHIRA_HD uint64_t at(int64_t row, int64_t within) const {
    return static_cast<uint64_t>(first) + static_cast<uint64_t>(row) * static_cast<uint64_t>(stride) +
           static_cast<uint64_t>(within);
  }
};

// The word at `position`, from memory of any alignment.
SHIRA_HD uint64_t load_word(const uint8_t* data, int64_t bytes, int64_t position) {
  const int64_t at = position * kWordBytes, left = bytes - at;
  uint64_t word = 0;
  if (left >= kWordBytes) {
    memcpy(&word, data + at, kWordBytes);
  } else {
    for (int64_t i = 0; i < left; ++i) word |= static_cast<uint64_t>(data[at + i]) << (8 * i);
  }
  return word;
}

// The rest is for the host only: nvcc would compile it without the vector paths, and the linker might keep that copy.
#if !defined(__CUDACC__)

// Whole words [begin, end) only; a last word that is padded is left to the caller. `shift` is added to their positions.
inline uint64_t sum_words_portable(const uint8_t* data, int64_t begin, int64_t end, uint64_t shift = 0) {
  uint64_t sum = 0, position = (static_cast<uint64_t>(begin) + shift) * kGolden;
  for (int64_t p = begin; p < end; ++p, position += kGolden) {
    uint64_t word;
    memcpy(&word, data + p * kWordBytes, kWordBytes);
    sum += splitmix64(word ^ position);
  }
  return sum;
}

#if SHIRA_X86
// The hardware's prefetch stops at the end of a page; this carries on into the next.
constexpr int64_t kFingerprintAhead = 4096;

SHIRA_AVX2 inline __m256i multiply_avx2(__m256i x, uint64_t constant) {
  const __m256i factor = _mm256_set1_epi64x(static_cast<long long>(constant));
  const __m256i high_factor = _mm256_set1_epi64x(static_cast<long long>(constant >> 32));
  const __m256i cross =
      _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor), _mm256_mul_epu32(x, high_factor));
  return _mm256_add_epi64(_mm256_mul_epu32(x, factor), _mm256_slli_epi64(cross, 32));
}

SHIRA_AVX2 inline uint64_t sum_words_avx2(const uint8_t* data, int64_t begin, int64_t end, uint64_t shift = 0) {
  const __m256i golden = _mm256_set1_epi64x(static_cast<long long>(kGolden));
  const __m256i step = _mm256_set1_epi64x(static_cast<long long>(4 * kGolden));
  const uint64_t first = (static_cast<uint64_t>(begin) + shift) * kGolden;
  __m256i position =
      _mm256_set_epi64x(static_cast<long long>(first + 3 * kGolden), static_cast<long long>(first + 2 * kGolden),
                        static_cast<long long>(first + kGolden), static_cast<long long>(first));
  __m256i sum = _mm256_setzero_si256();
  int64_t p = begin;
  for (; p + 4 <= end; p += 4) {
    const uint8_t* at = data + p * kWordBytes;
    _mm_prefetch(reinterpret_cast<const char*>(at) + kFingerprintAhead, _MM_HINT_T0);
    __m256i z = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    z = _mm256_add_epi64(_mm256_xor_si256(z, position), golden);
    z = multiply_avx2(_mm256_xor_si256(z, _mm256_srli_epi64(z, 30)), kMix1);
    z = multiply_avx2(_mm256_xor_si256(z, _mm256_srli_epi64(z, 27)), kMix2);
    sum = _mm256_add_epi64(sum, _mm256_xor_si256(z, _mm256_srli_epi64(z, 31)));
    position = _mm256_add_epi64(position, step);
  }
  uint64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + sum_words_portable(data, p, end, shift);
}

// splitmix64 of each lane.
SHIRA_AVX512 inline __m512i mix_avx512(__m512i z) {
  z = _mm512_add_epi64(z, _mm512_set1_epi64(static_cast<long long>(kGolden)));
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)),
                         _mm512_set1_epi64(static_cast<long long>(kMix1)));
  z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)),
                         _mm512_set1_epi64(static_cast<long long>(kMix2)));
  return _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
}
SHIRA_AVX512 inline uint64_t total_avx512(__m512i sum) {
  uint64_t lanes[8], total = 0;  // unsigned: the intrinsic that reduces adds signed numbers, which may not overflow
  _mm512_storeu_si512(lanes, sum);
  for (const uint64_t lane : lanes) total += lane;
  return total;
}

SHIRA_AVX512 inline uint64_t sum_words_avx512(const uint8_t* data, int64_t begin, int64_t end, uint64_t shift = 0) {
  const __m512i golden = _mm512_set1_epi64(static_cast<long long>(kGolden));
  const __m512i step = _mm512_set1_epi64(static_cast<long long>(8 * kGolden));
  const __m512i first = _mm512_set1_epi64(static_cast<long long>(static_cast<uint64_t>(begin) + shift));
  __m512i position = _mm512_mullo_epi64(_mm512_add_epi64(first, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)), golden);
  __m512i sum = _mm512_setzero_si512();
  int64_t p = begin;
  for (; p + 8 <= end; p += 8) {
    const uint8_t* at = data + p * kWordBytes;
    _mm_prefetch(reinterpret_cast<const char*>(at) + kFingerprintAhead, _MM_HINT_T0);
    sum = _mm512_add_epi64(sum, mix_avx512(_mm512_xor_si512(_mm512_loadu_si512(at), position)));
    position = _mm512_add_epi64(position, step);
  }
  return total_avx512(sum) + sum_words_portable(data, p, end, shift);
}
#endif

inline uint64_t sum_whole_words(const uint8_t* data, int64_t begin, int64_t end, uint64_t shift, Width width) {
#if SHIRA_X86
  if (width == Width::Avx512) return sum_words_avx512(data, begin, end, shift);
  if (width == Width::Avx2) return sum_words_avx2(data, begin, end, shift);
#endif
  (void)width;
  return sum_words_portable(data, begin, end, shift);
}

// The share of words [begin, end), the padded last one included.
inline uint64_t sum_words(const uint8_t* data, int64_t bytes, int64_t begin, int64_t end, Width width = widest()) {
  if (begin >= end) return 0;
  uint64_t sum = 0;
  const int64_t whole = bytes / kWordBytes;
  if (end > whole) {
    sum += mix_word(load_word(data, bytes, whole), static_cast<uint64_t>(whole));
    end = whole;
  }
  return sum + sum_whole_words(data, begin, end, 0, width);
}

// The share of words [begin, end) of a part of a larger tensor, by their positions there (see `Placing`); the padded
// last one included.
inline uint64_t sum_placed(const uint8_t* data, int64_t bytes, int64_t begin, int64_t end, const Placing& placing,
                           Width width = widest()) {
  uint64_t sum = 0;
  const int64_t whole = bytes / kWordBytes;
  if (begin < end && end > whole) {
    sum += mix_word(load_word(data, bytes, whole), placing.at(whole / placing.run, whole % placing.run));
    end = whole;
  }
  for (int64_t p = begin; p < end;) {
    const int64_t row = p / placing.run, left = placing.run - p % placing.run;
    const int64_t next = end - p < left ? end : p + left;
    const uint64_t position = placing.at(row, p % placing.run);
    sum += sum_whole_words(data, p, next, position - static_cast<uint64_t>(p), width);
    p = next;
  }
  return sum;
}

// ---- the words that granules touch

// The first and the last word of a granule.
template <typename Index>
inline int64_t first_word(Index granule, int64_t granule_bytes) {
  return static_cast<int64_t>(granule) * granule_bytes / kWordBytes;
}
template <typename Index>
inline int64_t last_word(Index granule, int64_t granule_bytes) {
  return ((static_cast<int64_t>(granule) + 1) * granule_bytes - 1) / kWordBytes;
}

constexpr int64_t kTouchedAhead = 32;  // granules whose first line is on its way

#if SHIRA_X86
SHIRA_AVX512 inline __m512i load_avx512(const int32_t* indices) {
  return _mm512_cvtepi32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices)));
}
SHIRA_AVX512 inline __m512i load_avx512(const int64_t* indices) { return _mm512_loadu_si512(indices); }
// The share of the first granules, of 2^log bytes that a word holds whole, eight at a time: how many is `done`, and the
// last word of these is `last`. Whole words only.
template <typename Index>
SHIRA_AVX512 inline uint64_t sum_touched_avx512(const uint8_t* data, int64_t whole, const Index* indices, int64_t begin,
                                                int64_t end, int log, int64_t& done, int64_t& last) {
  const __m512i golden = _mm512_set1_epi64(static_cast<long long>(kGolden));
  const __m128i shift = _mm_cvtsi32_si128(3 - log);
  __m512i sum = _mm512_setzero_si512(), before = _mm512_set1_epi64(last);
  int64_t i = begin;
  for (; i + 8 <= end && (static_cast<int64_t>(indices[i + 7]) << log >> 3) < whole; i += 8) {
    if (i + kTouchedAhead + 8 <= end)
      for (int64_t k = i + kTouchedAhead; k < i + kTouchedAhead + 8; ++k)
        __builtin_prefetch(data + (static_cast<int64_t>(indices[k]) << log));
    const __m512i at = _mm512_srl_epi64(load_avx512(indices + i), shift);
    // A word that the granule before touches too counts there.
    const __mmask8 counts = _mm512_cmpneq_epi64_mask(at, _mm512_alignr_epi64(at, before, 7));
    const __m512i words = _mm512_i64gather_epi64(at, data, 8);
    sum = _mm512_mask_add_epi64(sum, counts, sum, mix_avx512(_mm512_xor_si512(words, _mm512_mullo_epi64(at, golden))));
    before = at;
  }
  if (i > begin) last = static_cast<int64_t>(indices[i - 1]) << log >> 3;
  done = i;
  return total_avx512(sum);
}
#endif

// The share of words that were read already, wherever they lie in the tensor.
#if SHIRA_X86
SHIRA_AVX512 inline uint64_t sum_read_avx512(const int64_t* words, const int64_t* positions, int64_t& begin,
                                             int64_t end) {
  const __m512i golden = _mm512_set1_epi64(static_cast<long long>(kGolden));
  __m512i sum = _mm512_setzero_si512();
  for (; begin + 8 <= end; begin += 8) {
    const __m512i place = _mm512_mullo_epi64(_mm512_loadu_si512(positions + begin), golden);
    sum = _mm512_add_epi64(sum, mix_avx512(_mm512_xor_si512(_mm512_loadu_si512(words + begin), place)));
  }
  return total_avx512(sum);
}
#endif
inline uint64_t sum_read(const int64_t* words, const int64_t* positions, int64_t begin, int64_t end,
                         Width width = widest()) {
  uint64_t sum = 0;
#if SHIRA_X86
  if (width == Width::Avx512) sum += sum_read_avx512(words, positions, begin, end);
#endif
  (void)width;
  for (; begin < end; ++begin)
    sum += mix_word(static_cast<uint64_t>(words[begin]), static_cast<uint64_t>(positions[begin]));
  return sum;
}

// The logarithm of a size that words hold whole granules of, or -1.
inline int word_part(int64_t granule_bytes) {
  return granule_bytes == 1 ? 0 : granule_bytes == 2 ? 1 : granule_bytes == 4 ? 2 : granule_bytes == 8 ? 3 : -1;
}

// The share of the words that granules `indices[begin .. end)`, of `granule_bytes` bytes each, touch. Each word counts
// once: one that granule `begin - 1` touches too belongs to that granule.
template <typename Index>
inline uint64_t sum_touched(const uint8_t* data, int64_t bytes, const Index* indices, int64_t begin, int64_t end,
                            int64_t granule_bytes, Width width = widest()) {
  uint64_t sum = 0;
  int64_t done = begin > 0 ? last_word(indices[begin - 1], granule_bytes) : -1;
#if SHIRA_X86
  const int log = word_part(granule_bytes);
  if (width == Width::Avx512 && log >= 0)
    sum += sum_touched_avx512(data, bytes / kWordBytes, indices, begin, end, log, begin, done);
#endif
  for (int64_t i = begin; i < end; ++i) {
    if (i + kTouchedAhead < end)
      __builtin_prefetch(data + static_cast<int64_t>(indices[i + kTouchedAhead]) * granule_bytes);
    const int64_t first = first_word(indices[i], granule_bytes), last = last_word(indices[i], granule_bytes);
    const int64_t from = first > done ? first : done + 1;
    if (last - from < 4) {
      for (int64_t p = from; p <= last; ++p) sum += mix_word(load_word(data, bytes, p), static_cast<uint64_t>(p));
    } else {
      sum += sum_words(data, bytes, from, last + 1, width);
    }
    done = last;
  }
  return sum;
}

// ---- a swap, and by how much it changes the fingerprint
//
// Granule after granule: the share of its words afterwards, less that before. Where two of them share a word, the first
// one's "after" is the second one's "before", so the sum is right without looking at the neighbours.

namespace detail {

// One granule of any size.
inline uint64_t swap_granule(uint8_t* data, int64_t bytes, int64_t granule, int64_t granule_bytes, uint8_t* values,
                             Width width) {
  const int64_t first = first_word(granule, granule_bytes), end = last_word(granule, granule_bytes) + 1;
  uint8_t* at = data + granule * granule_bytes;
  const uint64_t before = sum_words(data, bytes, first, end, width);
  std::swap_ranges(at, at + granule_bytes, values);
  return sum_words(data, bytes, first, end, width) - before;
}

// One granule that lies in one whole word, which stays in a register: a load of the word right after the store of a
// part of it would wait for that.
template <typename Part>
inline uint64_t swap_part(uint8_t* data, int64_t granule, uint8_t* values) {
  constexpr int64_t kParts = kWordBytes / sizeof(Part);
  const int64_t position = granule / kParts;
  const int shift = static_cast<int>(granule % kParts * sizeof(Part) * 8);
  uint64_t word;
  Part value;
  memcpy(&word, data + position * kWordBytes, kWordBytes);
  memcpy(&value, values, sizeof(Part));
  const Part old = static_cast<Part>(word >> shift);
  const uint64_t after = word ^ static_cast<uint64_t>(static_cast<Part>(old ^ value)) << shift;
  memcpy(data + position * kWordBytes, &after, kWordBytes);
  memcpy(values, &old, sizeof(Part));
  return mix_word(after, static_cast<uint64_t>(position)) - mix_word(word, static_cast<uint64_t>(position));
}

// The first granules, as many as lie in whole words: how many is `begin` afterwards.
template <typename Part, typename Index>
inline uint64_t swap_parts(uint8_t* data, int64_t whole, const Index* indices, int64_t& begin, int64_t end,
                           uint8_t* values) {
  constexpr int64_t kParts = kWordBytes / sizeof(Part);
  uint64_t sum = 0;
  for (; begin < end && static_cast<int64_t>(indices[begin]) / kParts < whole; ++begin) {
    if (begin + kTouchedAhead < end)
      __builtin_prefetch(data + static_cast<int64_t>(indices[begin + kTouchedAhead]) * int64_t{sizeof(Part)}, 1);
    sum += swap_part<Part>(data, indices[begin], values + begin * int64_t{sizeof(Part)});
  }
  return sum;
}

#if SHIRA_X86
template <typename Part>
SHIRA_AVX512 inline __m512i load_parts_avx512(const uint8_t* values) {
  if constexpr (sizeof(Part) == 1)
    return _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(values)));
  if constexpr (sizeof(Part) == 2)
    return _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  if constexpr (sizeof(Part) == 4)
    return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  return _mm512_loadu_si512(values);
}
template <typename Part>
SHIRA_AVX512 inline void store_parts_avx512(uint8_t* values, __m512i parts) {
  if constexpr (sizeof(Part) == 1)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(values), _mm512_cvtepi64_epi8(parts));
  else if constexpr (sizeof(Part) == 2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm512_cvtepi64_epi16(parts));
  else if constexpr (sizeof(Part) == 4)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), _mm512_cvtepi64_epi32(parts));
  else
    _mm512_storeu_si512(values, parts);
}

// The same, eight granules at a time where no two of them share a word.
template <typename Part, typename Index>
SHIRA_AVX512 inline uint64_t swap_parts_avx512(uint8_t* data, int64_t whole, const Index* indices, int64_t& begin,
                                               int64_t end, uint8_t* values) {
  constexpr int64_t kParts = kWordBytes / sizeof(Part);
  constexpr uint64_t kMask = std::numeric_limits<Part>::max();
  const __m512i golden = _mm512_set1_epi64(static_cast<long long>(kGolden));
  __m512i sum = _mm512_setzero_si512();
  uint64_t rest = 0;
  int64_t i = begin;
  for (; i + 8 <= end && static_cast<int64_t>(indices[i + 7]) / kParts < whole; i += 8) {
    if (i + kTouchedAhead + 8 <= end)
      for (int64_t k = i + kTouchedAhead; k < i + kTouchedAhead + 8; ++k)
        __builtin_prefetch(data + static_cast<int64_t>(indices[k]) * int64_t{sizeof(Part)}, 1);
    const __m512i granule = load_avx512(indices + i);
    const __m512i at = _mm512_srli_epi64(granule, sizeof(Part) == 1 ? 3 : sizeof(Part) == 2 ? 2 : sizeof(Part) == 4);
    uint8_t* const parts = values + i * int64_t{sizeof(Part)};
    if (_mm512_cmpeq_epi64_mask(at, _mm512_alignr_epi64(at, at, 7)) & 0xFE) {
      for (int k = 0; k < 8; ++k) rest += swap_part<Part>(data, indices[i + k], parts + k * sizeof(Part));
      continue;
    }
    const __m512i shift =
        _mm512_and_si512(_mm512_mullo_epi64(granule, _mm512_set1_epi64(8 * sizeof(Part))), _mm512_set1_epi64(63));
    const __m512i word = _mm512_i64gather_epi64(at, data, 8), old = _mm512_srlv_epi64(word, shift);
    const __m512i change = _mm512_and_si512(_mm512_xor_si512(old, load_parts_avx512<Part>(parts)),
                                            _mm512_set1_epi64(static_cast<long long>(kMask)));
    const __m512i after = _mm512_xor_si512(word, _mm512_sllv_epi64(change, shift));
    store_parts_avx512<Part>(parts, old);
    _mm512_i64scatter_epi64(data, at, after, 8);
    const __m512i place = _mm512_mullo_epi64(at, golden);
    sum = _mm512_add_epi64(
        sum, _mm512_sub_epi64(mix_avx512(_mm512_xor_si512(after, place)), mix_avx512(_mm512_xor_si512(word, place))));
  }
  begin = i;
  return rest + total_avx512(sum);
}
#endif

template <typename Part, typename Index>
inline uint64_t swap_parts(uint8_t* data, int64_t whole, const Index* indices, int64_t& begin, int64_t end,
                           uint8_t* values, Width width) {
  uint64_t sum = 0;
#if SHIRA_X86
  if (width == Width::Avx512) sum += swap_parts_avx512<Part>(data, whole, indices, begin, end, values);
#endif
  (void)width;
  return sum + swap_parts<Part>(data, whole, indices, begin, end, values);
}

}  // namespace detail

// Swaps granules `indices[begin .. end)` of the weight with those at the same places of `values`. No other granule may
// be written meanwhile that touches a word of these.
template <typename Index>
inline uint64_t swap_touched(uint8_t* data, int64_t bytes, const Index* indices, int64_t begin, int64_t end,
                             int64_t granule_bytes, uint8_t* values, Width width = widest()) {
  const int64_t whole = bytes / kWordBytes;
  uint64_t sum = 0;
  switch (granule_bytes) {
    case 1: sum += detail::swap_parts<uint8_t>(data, whole, indices, begin, end, values, width); break;
    case 2: sum += detail::swap_parts<uint16_t>(data, whole, indices, begin, end, values, width); break;
    case 4: sum += detail::swap_parts<uint32_t>(data, whole, indices, begin, end, values, width); break;
    case 8: sum += detail::swap_parts<uint64_t>(data, whole, indices, begin, end, values, width); break;
    default: break;
  }
  for (int64_t i = begin; i < end; ++i) {
    if (i + kTouchedAhead < end)
      __builtin_prefetch(data + static_cast<int64_t>(indices[i + kTouchedAhead]) * granule_bytes, 1);
    sum += detail::swap_granule(data, bytes, indices[i], granule_bytes, values + i * granule_bytes, width);
  }
  return sum;
}

#endif  // !defined(__CUDACC__)

}  // namespace shira::core
