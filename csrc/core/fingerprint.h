// The fingerprint of a tensor: the sum mod 2^64, over its bytes as little-endian 64-bit words (the last one
// padded with zeros), of splitmix64(word ^ position * kGolden). A sum, so any order of words gives the same
// bits, and the words that changed can be replaced in it: new = old - at(before) + at(after).
#pragma once
#include <cstring>

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

SHIRA_AVX512 inline uint64_t sum_words_avx512(const uint8_t* data, int64_t begin, int64_t end, uint64_t shift = 0) {
  const __m512i golden = _mm512_set1_epi64(static_cast<long long>(kGolden));
  const __m512i mix1 = _mm512_set1_epi64(static_cast<long long>(kMix1));
  const __m512i mix2 = _mm512_set1_epi64(static_cast<long long>(kMix2));
  const __m512i step = _mm512_set1_epi64(static_cast<long long>(8 * kGolden));
  const __m512i first = _mm512_set1_epi64(static_cast<long long>(static_cast<uint64_t>(begin) + shift));
  __m512i position = _mm512_mullo_epi64(_mm512_add_epi64(first, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)), golden);
  __m512i sum = _mm512_setzero_si512();
  int64_t p = begin;
  for (; p + 8 <= end; p += 8) {
    const uint8_t* at = data + p * kWordBytes;
    _mm_prefetch(reinterpret_cast<const char*>(at) + kFingerprintAhead, _MM_HINT_T0);
    __m512i z = _mm512_loadu_si512(at);
    z = _mm512_add_epi64(_mm512_xor_si512(z, position), golden);
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 30)), mix1);
    z = _mm512_mullo_epi64(_mm512_xor_si512(z, _mm512_srli_epi64(z, 27)), mix2);
    sum = _mm512_add_epi64(sum, _mm512_xor_si512(z, _mm512_srli_epi64(z, 31)));
    position = _mm512_add_epi64(position, step);
  }
  uint64_t lanes[8];  // unsigned: the intrinsic that reduces adds signed numbers, which may not overflow
  _mm512_storeu_si512(lanes, sum);
  uint64_t total = 0;
  for (const uint64_t lane : lanes) total += lane;
  return total + sum_words_portable(data, p, end, shift);
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

// The share of the words that granules `indices[begin .. end)`, of `granule_bytes` bytes each, touch. Each word counts
// once: one that granule `begin - 1` touches too belongs to that granule.
template <typename Index>
inline uint64_t sum_touched(const uint8_t* data, int64_t bytes, const Index* indices, int64_t begin, int64_t end,
                            int64_t granule_bytes, Width width = widest()) {
  const auto last_word = [&](int64_t i) {
    return ((static_cast<int64_t>(indices[i]) + 1) * granule_bytes - 1) / kWordBytes;
  };
  constexpr int64_t kAhead = 32;  // granules whose first line is on its way
  uint64_t sum = 0;
  int64_t done = begin > 0 ? last_word(begin - 1) : -1;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) __builtin_prefetch(data + static_cast<int64_t>(indices[i + kAhead]) * granule_bytes);
    const int64_t first = static_cast<int64_t>(indices[i]) * granule_bytes / kWordBytes, last = last_word(i);
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

#endif  // !defined(__CUDACC__)

}  // namespace shira::core
