// The code of a list of indices: strictly increasing numbers as bytes. This is the only encoder and the only decoder;
// docs/format.md describes the format in prose.
//
// Blocks of 4096 indices, the last one shorter. The code is an anchor of 16 bytes for each block, then the
// payloads of the blocks back to back, so that blocks decode side by side:
//   u64  the first index of the block
//   u64  mode << 56 | where its payload starts, in bytes from the end of the anchors
// A payload holds the other indices as gaps, index - previous - 1, in units of
//   mode 0  a byte; 255 adds 255 to the gap and goes on, any other unit ends it
//   mode 1  a u16; 65535 likewise
//   mode 2  a u64, the gap itself
// The encoder takes mode 0 if its payload has at most 2 bytes per index of the block, else mode 1 if at most 8,
// else mode 2. Everything is little-endian.
//
// Version 2 has one mode more, with a parameter k from 0 to 24: the Rice code, within 2 % of the entropy of a random
// mask of any density below one half.
//   mode 3 + k  the low k bits of all gaps, packed and padded to a byte; then, gap after gap, a bit for each 2^k of
//               what is left of the gap, which is 0, and a one that ends it, padded to a byte
// Bits count from the lowest of each byte. The encoder takes it where its payload is shorter than the one above, with
// the k that makes it the shortest (the lowest of those).
//
// The decoder trusts nothing: what it writes is bounded by `count`, and `count` by the size of the code.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "hd.h"
#include "width.h"

namespace shira::core::codec {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the code is read and written in the machine's own order");

constexpr int64_t kBlock = 4096;
constexpr int64_t kAnchorBytes = 16;
enum Mode : uint32_t { kBytes = 0, kShorts = 1, kWords = 2, kRice = 3 };
constexpr int kMostLow = 24;  // bits: where they start in a byte, too, they end in the next four

// The low bits of so many gaps, in bytes.
SHIRA_HD int64_t low_bytes(int64_t gaps, int low) { return (gaps * low + 7) / 8; }
// The shortest payload of mode 3 + `low`: every gap has a bit that ends it.
SHIRA_HD int64_t fewest_rice(int64_t gaps, int low) { return low_bytes(gaps, low) + (gaps + 7) / 8; }

SHIRA_HD int64_t block_count(int64_t count) { return count / kBlock + (count % kBlock != 0); }
SHIRA_HD int64_t block_length(int64_t count, int64_t block) {
  const int64_t left = count - block * kBlock;
  return left < kBlock ? left : kBlock;
}

template <typename T>
SHIRA_HD T load(const uint8_t* at) {
  T value;
  memcpy(&value, at, sizeof(T));
  return value;
}
template <typename T>
SHIRA_HD void store(uint8_t* at, T value) {
  memcpy(at, &value, sizeof(T));
}

// A unit with this value adds it to the gap and is followed by another.
template <typename Unit>
constexpr uint64_t kEscape = std::numeric_limits<Unit>::max();

// ---------------------------------------------------------------------------------------------- refusals

// The sentence for entry `position`, which is below 0 or not above the one before it.
template <typename Index>
inline std::string explain_entry(Index entry, Index before, int64_t position) {
  std::ostringstream text;
  text << "encode_indices: indices must be strictly increasing and at least 0, got " << entry;
  if (entry >= 0) text << " after " << before;
  text << " at position " << position;
  return text.str();
}

// The sentence for the first such entry.
template <typename Index>
inline std::string explain_indices(const Index* indices, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || (i > 0 && indices[i] <= indices[i - 1]))
      return explain_entry(indices[i], i > 0 ? indices[i - 1] : Index{0}, i);
  return "encode_indices: indices changed while they were encoded";
}

// A code and what it is said to hold: `count` indices in [0, granules), each below `fits`, 2^31 or 2^63.
struct Code {
  const uint8_t* data;
  int64_t bytes;
  int64_t count;
  int64_t granules;
  int64_t fits;  // the largest index of the dtype

  int64_t blocks() const { return block_count(count); }
  int64_t anchors() const { return blocks() * kAnchorBytes; }
  int64_t payload_bytes() const { return bytes - anchors(); }
  uint64_t first(int64_t block) const { return load<uint64_t>(data + block * kAnchorBytes); }
  uint64_t place(int64_t block) const { return load<uint64_t>(data + block * kAnchorBytes + 8); }
  uint64_t bound() const {
    const uint64_t size = static_cast<uint64_t>(fits) + 1, limit = static_cast<uint64_t>(granules);
    return limit < size ? limit : size;
  }
};
constexpr uint64_t kStartMask = (uint64_t{1} << 56) - 1;

// The fewest bytes that hold `count` indices in the modes of version 1: an anchor for each block, and a byte for each
// other index.
inline uint64_t fewest_bytes(int64_t count) {
  return static_cast<uint64_t>(count) +
         static_cast<uint64_t>(kAnchorBytes - 1) * static_cast<uint64_t>(block_count(count));
}
// The same in the modes that the anchors tell, where there are that many.
inline uint64_t fewest_bytes(const Code& code) {
  if (code.blocks() > code.bytes / kAnchorBytes) return fewest_bytes(code.count);
  int64_t fewest = code.anchors();
  for (int64_t block = 0; block < code.blocks(); ++block) {
    const int64_t gaps = block_length(code.count, block) - 1;
    const uint64_t mode = code.place(block) >> 56;
    const bool rice = mode >= kRice && mode <= kRice + kMostLow;
    fewest += rice ? fewest_rice(gaps, static_cast<int>(mode - kRice)) : gaps;
  }
  return static_cast<uint64_t>(fewest);
}
// Whether a code is long enough for any modes, without a look at it.
inline bool surely_holds(const Code& code) {
  return code.count > 0 && fewest_bytes(code.count) <= static_cast<uint64_t>(code.bytes);
}
// Asked before anything is allocated, so that a code cannot ask for more than eight indices for each of its bytes.
inline bool holds(const Code& code) {
  if (code.count == 0) return code.bytes == 0;
  return surely_holds(code) || fewest_bytes(code) <= static_cast<uint64_t>(code.bytes);
}

// What is wrong with a code's size, or with the first block that decode_block refuses: what was given, and at which
// byte. This is the slow and obvious decoder, which stops at the first fault.
inline std::string explain_size(const Code& code) {
  std::ostringstream text;
  text << "decode_indices: code must have " << (code.count == 0 ? "" : "at least ") << fewest_bytes(code)
       << " bytes for " << code.count << " indices, got " << code.bytes;
  return text.str();
}

inline std::string explain_block(const Code& code, int64_t block) {
  std::ostringstream text;
  text << "decode_indices: code must ";
  const int64_t n = block_length(code.count, block), anchor = block * kAnchorBytes;
  const bool last = block + 1 == code.blocks();
  const uint64_t payload = static_cast<uint64_t>(code.payload_bytes());
  const uint64_t first = code.first(block), place = code.place(block), mode = place >> 56;
  const uint64_t start = place & kStartMask, end = last ? payload : code.place(block + 1) & kStartMask;
  const auto at_byte = [&](int64_t byte) { text << " in block " << block << " (byte " << byte << ")"; };

  if (block == 0 && start != 0) {
    text << "have its first payload at offset 0, got " << start;
    at_byte(8);
    return text.str();
  }
  if (end > payload || start > end || (!last && start == end)) {
    text << "have increasing payload offsets within its " << payload << " payload bytes, got " << end << " after "
         << start << " in block " << block + 1 << " (byte " << anchor + kAnchorBytes + 8 << ")";
    return text.str();
  }
  if (mode > kRice + kMostLow) {
    text << "have modes from 0 to " << kRice + kMostLow << ", got " << mode;
    at_byte(anchor + 15);
    return text.str();
  }
  // Whether an index is out of range, with the sentence up to what was given.
  const auto outside = [&](bool past_limit, bool past_dtype) {
    if (past_limit)
      text << "be strictly increasing in [0, " << code.granules << "), got ";
    else if (past_dtype)
      text << "have indices that fit " << (code.fits > INT32_MAX ? "int64" : "int32") << ", got ";
    return past_limit || past_dtype;
  };
  const uint64_t granules = static_cast<uint64_t>(code.granules), fits = static_cast<uint64_t>(code.fits);
  if (outside(first >= granules, first > fits)) {
    text << "first index " << first;
    at_byte(anchor);
    return text.str();
  }
  const uint8_t* data = code.data + code.anchors();
  uint64_t at = start, index = first;
  // Steps over a gap; false, with the sentence, where that leads outside.
  const auto step = [&](uint64_t gap, uint64_t gap_at) {
    // index + gap + 1 > bound - 1, without the sum: it may pass 2^64.
    if (outside(gap >= granules - 1 - index, gap >= fits - index)) {
      text << "a gap of " << gap << " after index " << index;
      at_byte(code.anchors() + static_cast<int64_t>(gap_at));
      return false;
    }
    index += gap + 1;
    return true;
  };
  const auto want_gaps = [&] { text << "have " << n - 1 << " gaps in each payload of " << n << " indices, got "; };
  const auto too_few = [&](int64_t found) {
    want_gaps();
    text << found << " by its end";
    at_byte(code.anchors() + static_cast<int64_t>(end));
    return text.str();
  };
  if (mode >= kRice) {
    const int low = static_cast<int>(mode - kRice);
    const uint64_t fewest = static_cast<uint64_t>(fewest_rice(n - 1, low));
    if (end - start < fewest) {
      text << "have at least " << fewest << " bytes in a payload of " << n << " indices in mode " << mode << ", got "
           << end - start;
      at_byte(code.anchors() + static_cast<int64_t>(start));
      return text.str();
    }
    const auto bit = [&](uint64_t from, uint64_t i) { return static_cast<uint64_t>(data[from + i / 8] >> i % 8 & 1); };
    const uint64_t lows = static_cast<uint64_t>(n - 1) * static_cast<uint64_t>(low), ones = start + (lows + 7) / 8;
    for (uint64_t i = lows; i % 8 != 0; ++i)
      if (bit(start, i) != 0) {
        text << "have zeros where a payload's low bits are padded, got a one";
        at_byte(code.anchors() + static_cast<int64_t>(ones - 1));
        return text.str();
      }
    const uint64_t bits = (end - ones) * 8;
    uint64_t i = 0;
    for (int64_t k = 1; k < n; ++k, ++i) {
      uint64_t gap = 0;
      for (; i < bits && bit(ones, i) == 0; ++i) ++gap;
      if (i == bits) return too_few(k - 1);
      gap <<= low;
      for (int b = 0; b < low; ++b) gap |= bit(start, static_cast<uint64_t>((k - 1) * low + b)) << b;
      if (!step(gap, ones + i / 8)) return text.str();
    }
    // What is left may be zeros up to the next byte, and nothing else.
    const uint64_t after = i;
    while (i % 8 != 0 && bit(ones, i) == 0) ++i;
    if (i != bits) {
      want_gaps();
      text << bits - after << " bits after them";
      at_byte(code.anchors() + static_cast<int64_t>(ones + i / 8));
      return text.str();
    }
  } else {
    const int64_t unit = mode == kBytes ? 1 : mode == kShorts ? 2 : 8;
    for (int64_t k = 1; k < n; ++k) {
      const uint64_t gap_at = at;
      uint64_t gap = 0;
      for (bool more = true; more;) {
        if (end - at < static_cast<uint64_t>(unit)) return too_few(k - 1);
        const uint64_t value = unit == 1 ? data[at] : unit == 2 ? load<uint16_t>(data + at) : load<uint64_t>(data + at);
        more = unit != 8 && value == (unit == 1 ? 255u : 65535u);
        gap += value;
        at += static_cast<uint64_t>(unit);
      }
      if (!step(gap, gap_at)) return text.str();
    }
    if (at != end) {
      want_gaps();
      text << end - at << " bytes after them";
      at_byte(code.anchors() + static_cast<int64_t>(at));
      return text.str();
    }
  }
  if (!last && code.first(block + 1) <= index) {
    text << "be strictly increasing in [0, " << code.granules << "), got first index " << code.first(block + 1)
         << " after " << index << " in block " << block + 1 << " (byte " << anchor + kAnchorBytes << ")";
    return text.str();
  }
  return "decode_indices: code changed while it was decoded";
}

// The rest is for the host only: nvcc would compile it without the vector paths, and the linker might keep that copy.
#if !defined(__CUDACC__)

struct Word {
  // The eight bytes of [at, end), with zeros after them.
  static uint64_t read(const uint8_t* at, const uint8_t* end) {
    uint64_t value = 0;
    if (end - at >= 8) return load<uint64_t>(at);
    if (end > at) memcpy(&value, at, static_cast<size_t>(end - at));
    return value;
  }
};

// ---------------------------------------------------------------------------------------------- encoder

struct Payload {
  enum Result { Done, TooLong, Unordered } result;
  uint32_t mode;
  int64_t bytes;
};

// Room that encode_block needs for a block of n indices: the longest payload, and what a vector store may spill.
constexpr int64_t room(int64_t n) { return 8 * n + 64; }

namespace detail {

// Appends the gap before each of indices[i .. stop). `out` stays at most `end`.
template <typename Unit, typename Index>
inline Payload::Result write_gaps(const Index* indices, int64_t i, int64_t stop, uint8_t*& out, const uint8_t* end) {
  uint8_t* at = out;
  for (Index before = indices[i - 1]; i < stop; ++i) {
    const Index here = indices[i];
    if (here <= before) return Payload::Unordered;
    uint64_t gap = static_cast<uint64_t>(here) - static_cast<uint64_t>(before) - 1;
    before = here;
    if (gap < 2 * kEscape<Unit> && end - at >= 2 * static_cast<int64_t>(sizeof(Unit))) {
      // One escape or none, without a branch: at 1 % every thirteenth gap has one, at random.
      const uint64_t escaped = gap >= kEscape<Unit>;
      store(at, static_cast<Unit>(kEscape<Unit>));
      at += escaped * sizeof(Unit);
      store(at, static_cast<Unit>(gap + escaped));  // gap - kEscape, in the unit's own size
      at += sizeof(Unit);
      continue;
    }
    if (gap >= kEscape<Unit>) {
      const int64_t escapes = static_cast<int64_t>(gap / kEscape<Unit>);
      // Compared as counts: a hostile gap can need more bytes than a pointer can be moved by.
      if (escapes >= (end - at) / static_cast<int64_t>(sizeof(Unit))) return Payload::TooLong;
      memset(at, 0xFF, static_cast<size_t>(escapes) * sizeof(Unit));
      at += escapes * static_cast<int64_t>(sizeof(Unit));
      gap %= kEscape<Unit>;
    } else if (end - at < static_cast<int64_t>(sizeof(Unit))) {
      return Payload::TooLong;
    }
    store(at, static_cast<Unit>(gap));
    at += sizeof(Unit);
  }
  out = at;
  return Payload::Done;
}

#if SHIRA_X86
// For every set of 8 lanes, the lanes in it from low to high: what a compress does on one register.
struct CompressTable {
  alignas(64) uint8_t lanes[256][8];
  constexpr CompressTable() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int n = 0;
      for (int lane = 0; lane < 8; ++lane)
        if (mask >> lane & 1) lanes[mask][n++] = static_cast<uint8_t>(lane);
    }
  }
};
inline constexpr CompressTable kCompress{};

// For every set of 8 gaps that need an escape byte, the shuffle of [8 units, 255] that puts it before each.
struct ExpandTable {
  alignas(64) uint8_t bytes[256][16];
  constexpr ExpandTable() : bytes() {
    for (int mask = 0; mask < 256; ++mask) {
      int n = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) bytes[mask][n++] = 8;
        bytes[mask][n++] = static_cast<uint8_t>(lane);
      }
      while (n < 16) bytes[mask][n++] = 0;
    }
  }
};
inline constexpr ExpandTable kExpand{};

// The gaps before 16 indices, those past 32 bits cut to the largest number. `signs` collects sign bits: in 32
// bits a step down from a positive to a negative index can look like a small gap.
SHIRA_AVX512 inline __m512i gaps_avx512(const int32_t* indices, __m512i& signs) {
  const __m512i here = _mm512_loadu_si512(indices), before = _mm512_loadu_si512(indices - 1);
  signs = _mm512_or_si512(signs, here);
  return _mm512_add_epi32(_mm512_sub_epi32(here, before), _mm512_set1_epi32(-1));
}
SHIRA_AVX512 inline __m512i gaps_avx512(const int64_t* indices, __m512i& signs) {
  const __m512i one = _mm512_set1_epi64(-1);
  const __m512i low = _mm512_loadu_si512(indices), high = _mm512_loadu_si512(indices + 8);
  signs = _mm512_or_si512(signs, _mm512_or_si512(low, high));
  const __m512i low_gap = _mm512_add_epi64(_mm512_sub_epi64(low, _mm512_loadu_si512(indices - 1)), one);
  const __m512i high_gap = _mm512_add_epi64(_mm512_sub_epi64(high, _mm512_loadu_si512(indices + 7)), one);
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtusepi64_epi32(low_gap)), _mm512_cvtusepi64_epi32(high_gap),
                            1);
}
SHIRA_AVX512 inline bool any_sign(__m512i signs, const int32_t*) { return _mm512_movepi32_mask(signs) != 0; }
SHIRA_AVX512 inline bool any_sign(__m512i signs, const int64_t*) { return _mm512_movepi64_mask(signs) != 0; }

template <typename Index>
SHIRA_AVX512 inline Payload::Result write_bytes_avx512(const Index* indices, int64_t n, uint8_t*& out,
                                                       const uint8_t* end) {
  __m512i signs = _mm512_setzero_si512();
  uint8_t* at = out;
  int64_t i = 1;
  for (; i + 16 <= n; i += 16) {
    const __m512i gap = gaps_avx512(indices + i, signs);
    if (_mm512_cmpge_epu32_mask(gap, _mm512_set1_epi32(1020))) {
      const Payload::Result result = write_gaps<uint8_t>(indices, i, i + 16, at, end);
      if (result != Payload::Done) return result;
      continue;
    }
    // Up to 4 units a gap. escapes = gap / 255 exactly, and gap - 255 * escapes is the low byte of gap + escapes.
    const __m512i escapes =
        _mm512_srli_epi32(_mm512_madd_epi16(_mm512_add_epi32(gap, _mm512_set1_epi32(1)), _mm512_set1_epi32(257)), 16);
    const __m512i units =
        _mm512_or_si512(_mm512_slli_epi32(_mm512_add_epi32(gap, escapes), 24), _mm512_set1_epi32(0x00FFFFFF));
    const __m512i kept = _mm512_sllv_epi32(_mm512_set1_epi32(-1),
                                           _mm512_sub_epi32(_mm512_set1_epi32(24), _mm512_slli_epi32(escapes, 3)));
    const __mmask64 mask = _mm512_movepi8_mask(kept);
    // To a register, then to memory: the compress that writes memory itself is slow on some processors.
    _mm512_storeu_si512(at, _mm512_maskz_compress_epi8(mask, units));
    at += _mm_popcnt_u64(mask);
  }
  if (any_sign(signs, indices)) return Payload::Unordered;
  if (at > end) return Payload::TooLong;
  out = at;
  return write_gaps<uint8_t>(indices, i, n, out, end);
}

template <typename Index>
SHIRA_AVX512 inline Payload::Result write_shorts_avx512(const Index* indices, int64_t n, uint8_t*& out,
                                                        const uint8_t* end) {
  __m512i signs = _mm512_setzero_si512();
  uint8_t* at = out;
  int64_t i = 1;
  for (; i + 16 <= n; i += 16) {
    const __m512i gap = gaps_avx512(indices + i, signs);
    if (_mm512_cmpge_epu32_mask(gap, _mm512_set1_epi32(65535))) {
      const Payload::Result result = write_gaps<uint16_t>(indices, i, i + 16, at, end);
      if (result != Payload::Done) return result;
      continue;
    }
    if (end - at < 32) return Payload::TooLong;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(gap));
    at += 32;
  }
  if (any_sign(signs, indices)) return Payload::Unordered;
  if (at > end) return Payload::TooLong;
  out = at;
  return write_gaps<uint16_t>(indices, i, n, out, end);
}

// The same on 8 indices.
SHIRA_AVX2 inline __m256i gaps_avx2(const int32_t* indices, __m256i& signs) {
  const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices));
  const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices - 1));
  signs = _mm256_or_si256(signs, here);
  return _mm256_add_epi32(_mm256_sub_epi32(here, before), _mm256_set1_epi32(-1));
}
SHIRA_AVX2 inline __m256i gaps_avx2(const int64_t* indices, __m256i& signs) {
  const __m256i one = _mm256_set1_epi64x(-1), all = _mm256_set1_epi32(-1);
  __m256i gap[2];
  for (int half = 0; half < 2; ++half) {
    const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices + 4 * half));
    const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(indices + 4 * half - 1));
    signs = _mm256_or_si256(signs, here);
    const __m256i wide = _mm256_add_epi64(_mm256_sub_epi64(here, before), one);
    const __m256i fits = _mm256_cmpeq_epi64(_mm256_srli_epi64(wide, 32), _mm256_setzero_si256());
    gap[half] =
        _mm256_permutevar8x32_epi32(_mm256_blendv_epi8(all, wide, fits), _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  }
  return _mm256_blend_epi32(gap[0], gap[1], 0xF0);
}
SHIRA_AVX2 inline bool any_sign(__m256i signs, const int32_t*) {
  return _mm256_movemask_ps(_mm256_castsi256_ps(signs)) != 0;
}
SHIRA_AVX2 inline bool any_sign(__m256i signs, const int64_t*) {
  return _mm256_movemask_pd(_mm256_castsi256_pd(signs)) != 0;
}
// Unsigned gap <= bound in every lane.
SHIRA_AVX2 inline bool all_within(__m256i gap, int bound) {
  const __m256i limit = _mm256_set1_epi32(bound);
  return _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_max_epu32(gap, limit), limit)) == -1;
}

template <typename Index>
SHIRA_AVX2 inline Payload::Result write_bytes_avx2(const Index* indices, int64_t n, uint8_t*& out, const uint8_t* end) {
  __m256i signs = _mm256_setzero_si256();
  uint8_t* at = out;
  int64_t i = 1;
  for (; i + 8 <= n; i += 8) {
    const __m256i gap = gaps_avx2(indices + i, signs);
    if (!all_within(gap, 509)) {
      const Payload::Result result = write_gaps<uint8_t>(indices, i, i + 8, at, end);
      if (result != Payload::Done) return result;
      continue;
    }
    // Up to 2 units a gap: 255 less where there is an escape, and that is the low byte of gap + 1.
    const __m256i long_gap = _mm256_cmpgt_epi32(gap, _mm256_set1_epi32(254));
    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(long_gap));
    const __m256i unit = _mm256_and_si256(_mm256_sub_epi32(gap, long_gap), _mm256_set1_epi32(255));
    const __m128i shorts = _mm_packus_epi32(_mm256_castsi256_si128(unit), _mm256_extracti128_si256(unit, 1));
    const __m128i bytes = _mm_packus_epi16(shorts, _mm_set1_epi16(255));
    const __m128i shuffle = _mm_load_si128(reinterpret_cast<const __m128i*>(kExpand.bytes[mask]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm_shuffle_epi8(bytes, shuffle));
    at += 8 + _mm_popcnt_u32(static_cast<unsigned>(mask));
  }
  if (any_sign(signs, indices)) return Payload::Unordered;
  if (at > end) return Payload::TooLong;
  out = at;
  return write_gaps<uint8_t>(indices, i, n, out, end);
}

template <typename Index>
SHIRA_AVX2 inline Payload::Result write_shorts_avx2(const Index* indices, int64_t n, uint8_t*& out,
                                                    const uint8_t* end) {
  __m256i signs = _mm256_setzero_si256();
  uint8_t* at = out;
  int64_t i = 1;
  for (; i + 8 <= n; i += 8) {
    const __m256i gap = gaps_avx2(indices + i, signs);
    if (!all_within(gap, 65534)) {
      const Payload::Result result = write_gaps<uint16_t>(indices, i, i + 8, at, end);
      if (result != Payload::Done) return result;
      continue;
    }
    if (end - at < 16) return Payload::TooLong;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at),
                     _mm_packus_epi32(_mm256_castsi256_si128(gap), _mm256_extracti128_si256(gap, 1)));
    at += 16;
  }
  if (any_sign(signs, indices)) return Payload::Unordered;
  if (at > end) return Payload::TooLong;
  out = at;
  return write_gaps<uint16_t>(indices, i, n, out, end);
}
#endif  // SHIRA_X86

template <typename Index>
inline Payload::Result write_bytes(const Index* indices, int64_t n, uint8_t*& out, const uint8_t* end, Width width) {
#if SHIRA_X86
  if (width == Width::Avx512) return write_bytes_avx512(indices, n, out, end);
  if (width == Width::Avx2) return write_bytes_avx2(indices, n, out, end);
#endif
  (void)width;
  return write_gaps<uint8_t>(indices, 1, n, out, end);
}
template <typename Index>
inline Payload::Result write_shorts(const Index* indices, int64_t n, uint8_t*& out, const uint8_t* end, Width width) {
#if SHIRA_X86
  if (width == Width::Avx512) return write_shorts_avx512(indices, n, out, end);
  if (width == Width::Avx2) return write_shorts_avx2(indices, n, out, end);
#endif
  (void)width;
  return write_gaps<uint16_t>(indices, 1, n, out, end);
}
template <typename Index>
inline Payload::Result write_words(const Index* indices, int64_t n, uint8_t*& out) {
  uint8_t* at = out;
  for (int64_t i = 1; i < n; ++i, at += 8) {
    const Index here = indices[i], before = indices[i - 1];
    if (here <= before) return Payload::Unordered;
    store(at, static_cast<uint64_t>(here) - static_cast<uint64_t>(before) - 1);
  }
  out = at;
  return Payload::Done;
}

// The fewest units that n gaps of this sum can take: each leaves at most escape - 1 to its last unit.
template <typename Unit>
inline uint64_t fewest_units(uint64_t n, uint64_t sum) {
  const uint64_t last = n * (kEscape<Unit> - 1);
  return n + (sum > last ? (sum - last) / kEscape<Unit> : 0);
}

// The gaps of a block for mode 3 + k: at most 32 bits each, since one of more would take longer than in another mode.
struct Gaps {
  uint32_t gap[kBlock];
  int64_t count;

  // False if one is too wide. Where the indices are not in order, what is found here means nothing.
  template <typename Index>
  bool read(const Index* indices, int64_t n) {
    uint64_t all = 0;
    for (int64_t i = 1; i < n; ++i) {
      const uint64_t wide = static_cast<uint64_t>(indices[i]) - static_cast<uint64_t>(indices[i - 1]) - 1;
      gap[i - 1] = static_cast<uint32_t>(wide);
      all |= wide;
    }
    count = n - 1;
    return all >> 32 == 0;
  }
  // How many zeros the gaps have in the bitmap.
  uint64_t zeros(int low) const {
    uint64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += gap[i] >> low;
    return sum;
  }
  // How many bits fewer one low bit more takes: falls as `low` grows, so the least is where it is no gain any more.
  int64_t gain(int low) const { return static_cast<int64_t>(zeros(low) - zeros(low + 1)) - count; }
  int best_low(uint64_t sum) const {
    int low = 0;
    while (low < kMostLow && static_cast<uint64_t>(count) << (low + 1) <= sum) ++low;
    if (low < kMostLow && gain(low) > 0) {
      do ++low;
      while (low < kMostLow && gain(low) > 0);
    } else {
      while (low > 0 && gain(low - 1) <= 0) --low;
    }
    return low;
  }
  // Into bytes that lie within room(n).
  void write(int low, uint8_t* out, int64_t bytes) const {
    memset(out, 0, static_cast<size_t>(bytes));
    const uint32_t mask = (uint32_t{1} << low) - 1;
    uint64_t pending = 0;
    int held = 0;
    uint8_t* at = out;
    for (int64_t i = 0; i < count; ++i) {
      pending |= static_cast<uint64_t>(gap[i] & mask) << held;
      held += low;
      if (held < 32) continue;
      store(at, static_cast<uint32_t>(pending));
      at += 4;
      pending >>= 32;
      held -= 32;
    }
    for (; held > 0; held -= 8, pending >>= 8) *at++ = static_cast<uint8_t>(pending);
    uint64_t bit = 0;
    for (int64_t i = 0; i < count; ++i, ++bit) {
      bit += gap[i] >> low;
      at[bit / 8] |= static_cast<uint8_t>(1 << bit % 8);
    }
  }
};

}  // namespace detail

// The payload of one block of n >= 1 indices in the modes of version 1, into room(n) bytes. Nothing of it is valid
// unless it is Done.
template <typename Index>
inline Payload encode_gaps(const Index* indices, int64_t n, uint8_t* out, Width width) {
  const Index first = indices[0], last = indices[n - 1];
  if (first < 0 || last < first) return {Payload::Unordered, kBytes, 0};
  const uint64_t gaps = static_cast<uint64_t>(n - 1), span = static_cast<uint64_t>(last) - static_cast<uint64_t>(first);
  if (span < gaps) return {Payload::Unordered, kBytes, 0};
  // Modes that cannot fit are skipped.
  Payload::Result result = Payload::TooLong;
  uint8_t* end = out;
  if (detail::fewest_units<uint8_t>(gaps, span - gaps) <= static_cast<uint64_t>(2 * n)) {
    result = detail::write_bytes(indices, n, end, out + 2 * n, width);
    if (result != Payload::TooLong) return {result, kBytes, end - out};
  }
  if (2 * detail::fewest_units<uint16_t>(gaps, span - gaps) <= static_cast<uint64_t>(8 * n)) {
    end = out;
    result = detail::write_shorts(indices, n, end, out + 8 * n, width);
    if (result != Payload::TooLong) return {result, kShorts, end - out};
  }
  end = out;
  result = detail::write_words(indices, n, end);
  return {result, kWords, end - out};
}

// The same in the modes of a version, 1 or 2.
template <typename Index>
inline Payload encode_block(const Index* indices, int64_t n, uint8_t* out, Width width, int64_t version) {
  const Payload payload = encode_gaps(indices, n, out, width);
  if (version == 1 || payload.result != Payload::Done || n == 1) return payload;
  detail::Gaps gaps;
  if (!gaps.read(indices, n)) return payload;
  const uint64_t sum = static_cast<uint64_t>(indices[n - 1]) - static_cast<uint64_t>(indices[0]) - gaps.count;
  const int low = gaps.best_low(sum);
  const int64_t bits = gaps.count + static_cast<int64_t>(gaps.zeros(low));
  const int64_t bytes = low_bytes(gaps.count, low) + (bits + 7) / 8;
  if (bytes >= payload.bytes) return payload;
  gaps.write(low, out, bytes);
  return {Payload::Done, static_cast<uint32_t>(kRice + low), bytes};
}

// The code of a list, made in two walks over chunks, each of which may run on any thread: encode() into a buffer
// of the chunk, then, once all sizes are known, write() to where it belongs.
template <typename Index>
class Encoder {
 public:
  static constexpr int64_t kChunk = 16;  // blocks

  // In the modes of version 1, or in those of version 2, which readers of version 1 refuse.
  Encoder(const Index* indices, int64_t count, int64_t version, Width width = widest())
      : indices_(indices),
        count_(count),
        version_(version),
        width_(width),
        blocks_(block_count(count)),
        places_(static_cast<size_t>(blocks_)),
        chunks_(static_cast<size_t>((blocks_ + kChunk - 1) / kChunk)) {}

  int64_t chunks() const { return static_cast<int64_t>(chunks_.size()); }

  // False if the indices are not strictly increasing from 0 on: see explain_indices.
  bool encode(int64_t chunk) {
    Bytes& bytes = chunks_[static_cast<size_t>(chunk)];
    for (int64_t block = chunk * kChunk; block < last_block(chunk); ++block) {
      const Index* from = indices_ + block * kBlock;
      const int64_t n = block_length(count_, block);
      if (block > 0 && from[0] <= from[-1]) return false;
      const Payload payload =
          encode_block(from, n, bytes.reserve(room(n), (kBlock + kBlock / 8) * kChunk), width_, version_);
      if (payload.result != Payload::Done) return false;
      places_[static_cast<size_t>(block)] =
          static_cast<uint64_t>(payload.mode) << 56 | static_cast<uint64_t>(bytes.size);
      bytes.size += payload.bytes;
    }
    return true;
  }

  // How many bytes the code has. After every chunk's encode(), before any write().
  int64_t place() {
    int64_t start = 0;
    for (Bytes& bytes : chunks_) {
      bytes.start = start;
      start += bytes.size;
    }
    return blocks_ * kAnchorBytes + start;
  }

  void write(int64_t chunk, uint8_t* code) const {
    const Bytes& bytes = chunks_[static_cast<size_t>(chunk)];
    for (int64_t block = chunk * kChunk; block < last_block(chunk); ++block) {
      uint8_t* anchor = code + block * kAnchorBytes;
      store(anchor, static_cast<uint64_t>(indices_[block * kBlock]));
      store(anchor + 8, places_[static_cast<size_t>(block)] + static_cast<uint64_t>(bytes.start));
    }
    if (bytes.size > 0)
      memcpy(code + blocks_ * kAnchorBytes + bytes.start, bytes.data.get(), static_cast<size_t>(bytes.size));
  }

 private:
  // Bytes that grow without being cleared first.
  struct Bytes {
    std::unique_ptr<uint8_t[]> data;
    int64_t size = 0, capacity = 0, start = 0;

    uint8_t* reserve(int64_t more, int64_t usual) {
      if (capacity - size < more) {
        const int64_t grown = std::max(2 * capacity, size + more + usual);
        std::unique_ptr<uint8_t[]> bigger(new uint8_t[static_cast<size_t>(grown)]);
        if (size > 0) memcpy(bigger.get(), data.get(), static_cast<size_t>(size));
        data = std::move(bigger);
        capacity = grown;
      }
      return data.get() + size;
    }
  };
  int64_t last_block(int64_t chunk) const { return std::min(blocks_, (chunk + 1) * kChunk); }

  const Index* indices_;
  int64_t count_;
  int64_t version_;
  Width width_;
  int64_t blocks_;
  std::vector<uint64_t> places_;  // mode << 56 | start within the chunk's payloads
  std::vector<Bytes> chunks_;
};

// ---------------------------------------------------------------------------------------------- decoder

namespace detail {

// Where a block's decoding stands: the last index (mod 2^64, checked at the end), indices written, bytes read.
struct Cursor {
  uint64_t index;
  int64_t written;
  const uint8_t* at;
};

// One unit at a time, without a branch on it. Stops at n indices or at the end of the payload; anything left over is an
// error.
template <typename Unit, typename Index>
inline void read_units(Cursor& cursor, int64_t n, const uint8_t* end, Index* out) {
  uint64_t index = cursor.index;
  int64_t k = cursor.written;
  const uint8_t* at = cursor.at;
  while (k < n && end - at >= static_cast<int64_t>(sizeof(Unit))) {
    const uint64_t unit = load<Unit>(at);
    at += sizeof(Unit);
    const bool ends = unit != kEscape<Unit>;
    index += unit + ends;
    out[k] = static_cast<Index>(index);
    k += ends;
  }
  cursor = {index, k, at};
}

// Each gap is one word. False where an index would reach `bound`.
template <typename Index>
inline bool read_words(Cursor& cursor, int64_t n, const uint8_t* end, uint64_t bound, Index* out) {
  if (end - cursor.at != 8 * (n - cursor.written)) return false;
  uint64_t index = cursor.index;  // below bound
  for (int64_t k = cursor.written; k < n; ++k, cursor.at += 8) {
    const uint64_t gap = load<uint64_t>(cursor.at);
    if (gap >= bound - 1 - index) return false;
    index += gap + 1;
    out[k] = static_cast<Index>(index);
  }
  cursor.index = index;
  cursor.written = n;
  return true;
}

#if SHIRA_X86
// Lanes hold positions relative to the block's first index, mod 2^32: they may pass 2^32 only in payloads longer
// than this many bytes, which no encoder writes and which take the portable way.
template <typename Unit>
constexpr int64_t kVectorPayload = static_cast<int64_t>(0xFFFFFFFFu / kEscape<Unit> * sizeof(Unit)) - 64;

SHIRA_AVX512 inline void store16(int32_t* out, uint64_t base, __m512i relative) {
  _mm512_storeu_si512(out, _mm512_add_epi32(relative, _mm512_set1_epi32(static_cast<int32_t>(base))));
}
SHIRA_AVX512 inline void store16(int64_t* out, uint64_t base, __m512i relative) {
  const __m512i wide = _mm512_set1_epi64(static_cast<long long>(base));
  _mm512_storeu_si512(out, _mm512_add_epi64(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(relative)), wide));
  _mm512_storeu_si512(out + 8, _mm512_add_epi64(_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(relative, 1)), wide));
}

// 16 units: the step each takes, and which of them end a gap.
template <typename Unit>
SHIRA_AVX512 inline __m512i steps_avx512(const uint8_t* at, __mmask16& ends) {
  if constexpr (sizeof(Unit) == 1) {
    const __m128i units = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    ends = _mm_cmpneq_epu8_mask(units, _mm_set1_epi8(-1));
    return _mm512_cvtepu8_epi32(_mm_adds_epu8(units, _mm_set1_epi8(1)));  // unit + 1, and 255 stays 255
  } else {
    const __m256i units = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    ends = _mm256_cmpneq_epu16_mask(units, _mm256_set1_epi16(-1));
    return _mm512_cvtepu16_epi32(_mm256_adds_epu16(units, _mm256_set1_epi16(1)));
  }
}

template <typename Unit, typename Index>
SHIRA_AVX512 inline void read_units_avx512(Cursor& cursor, int64_t n, const uint8_t* end, Index* out) {
  const uint64_t base = cursor.index;
  const __m512i zero = _mm512_setzero_si512(), last_lane = _mm512_set1_epi32(15);
  __m512i reached = zero;  // in every lane: how far past `base` the last unit came
  int64_t k = cursor.written;
  const uint8_t* at = cursor.at;
  for (; n - k >= 16 && end - at >= static_cast<int64_t>(16 * sizeof(Unit)); at += 16 * sizeof(Unit)) {
    __mmask16 ends;
    __m512i sum = steps_avx512<Unit>(at, ends);
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 15));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 14));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 12));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 8));
    const __m512i relative = _mm512_add_epi32(sum, reached);
    reached = _mm512_add_epi32(reached, _mm512_permutexvar_epi32(last_lane, sum));
    store16(out + k, base, _mm512_maskz_compress_epi32(ends, relative));
    k += _mm_popcnt_u32(ends);
  }
  const uint32_t distance = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(reached)));
  cursor = {base + distance, k, at};
}

SHIRA_AVX2 inline void store8(int32_t* out, uint64_t base, __m256i relative) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      _mm256_add_epi32(relative, _mm256_set1_epi32(static_cast<int32_t>(base))));
}
SHIRA_AVX2 inline void store8(int64_t* out, uint64_t base, __m256i relative) {
  const __m256i wide = _mm256_set1_epi64x(static_cast<long long>(base));
  const __m256i low = _mm256_cvtepu32_epi64(_mm256_castsi256_si128(relative));
  const __m256i high = _mm256_cvtepu32_epi64(_mm256_extracti128_si256(relative, 1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_add_epi64(low, wide));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 4), _mm256_add_epi64(high, wide));
}

// 8 units: the running sum of their steps, and which of them end a gap.
template <typename Unit>
SHIRA_AVX2 inline __m256i sums_avx2(const uint8_t* at, unsigned& ends) {
  if constexpr (sizeof(Unit) == 1) {
    const __m128i units = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    ends = ~static_cast<unsigned>(_mm_movemask_epi8(_mm_cmpeq_epi8(units, _mm_set1_epi8(-1)))) & 255u;
    __m128i sum = _mm_cvtepu8_epi16(_mm_adds_epu8(units, _mm_set1_epi8(1)));
    sum = _mm_add_epi16(sum, _mm_slli_si128(sum, 2));
    sum = _mm_add_epi16(sum, _mm_slli_si128(sum, 4));
    return _mm256_cvtepu16_epi32(_mm_add_epi16(sum, _mm_slli_si128(sum, 8)));
  } else {
    const __m128i units = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    const __m128i escaped = _mm_cmpeq_epi16(units, _mm_set1_epi16(-1));
    ends = ~static_cast<unsigned>(_mm_movemask_epi8(_mm_packs_epi16(escaped, escaped))) & 255u;
    __m256i sum = _mm256_cvtepu16_epi32(_mm_adds_epu16(units, _mm_set1_epi16(1)));
    sum = _mm256_add_epi32(sum, _mm256_slli_si256(sum, 4));
    sum = _mm256_add_epi32(sum, _mm256_slli_si256(sum, 8));
    const __m256i low_total = _mm256_permutevar8x32_epi32(sum, _mm256_set1_epi32(3));
    return _mm256_add_epi32(sum, _mm256_blend_epi32(_mm256_setzero_si256(), low_total, 0xF0));
  }
}

template <typename Unit, typename Index>
SHIRA_AVX2 inline void read_units_avx2(Cursor& cursor, int64_t n, const uint8_t* end, Index* out) {
  const uint64_t base = cursor.index;
  __m256i reached = _mm256_setzero_si256();
  int64_t k = cursor.written;
  const uint8_t* at = cursor.at;
  for (; n - k >= 8 && end - at >= static_cast<int64_t>(8 * sizeof(Unit)); at += 8 * sizeof(Unit)) {
    unsigned ends;
    const __m256i sum = sums_avx2<Unit>(at, ends);
    const __m256i relative = _mm256_add_epi32(sum, reached);
    reached = _mm256_add_epi32(reached, _mm256_permutevar8x32_epi32(sum, _mm256_set1_epi32(7)));
    const __m256i lanes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[ends])));
    store8(out + k, base, _mm256_permutevar8x32_epi32(relative, lanes));
    k += _mm_popcnt_u32(ends);
  }
  const uint32_t distance = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(reached)));
  cursor = {base + distance, k, at};
}
#endif  // SHIRA_X86

// The sum of a payload's units is at most 255 * bytes, so `index` cannot wrap from below 2^63.
template <typename Unit, typename Index>
inline void read_payload(Cursor& cursor, int64_t n, const uint8_t* end, Index* out, Width width) {
#if SHIRA_X86
  if (width != Width::Portable && end - cursor.at <= kVectorPayload<Unit>) {
    if (width == Width::Avx512)
      read_units_avx512<Unit>(cursor, n, end, out);
    else
      read_units_avx2<Unit>(cursor, n, end, out);
  }
#endif
  (void)width;
  read_units<Unit>(cursor, n, end, out);
}

// ---- mode 3 + k

// The parts of a payload, and where the code ends: nothing is read from there on.
struct Rice {
  int low;  // bits
  int64_t gaps;
  const uint8_t *lows, *ones, *end, *limit;

  uint64_t bits() const { return static_cast<uint64_t>(end - ones) * 8; }
  uint32_t mask() const { return (uint32_t{1} << low) - 1; }

  uint32_t low_of(int64_t gap) const {
    const int64_t bit = gap * low;
    return static_cast<uint32_t>(Word::read(lows + bit / 8, ones) >> bit % 8) & mask();
  }
  // Whether the parts are long enough for any gaps, and padded with zeros.
  bool is_padded() const {
    if (end - lows < fewest_rice(gaps, low)) return false;
    const int used = static_cast<int>(gaps * low % 8);
    if (used != 0 && ones[-1] >> used != 0) return false;
    return gaps == 0 ? ones == end : end[-1] != 0;
  }
};

// Every gap in numbers of 64 bits, each of them checked.
template <typename Index>
inline bool read_rice(const Rice& rice, Cursor& cursor, uint64_t bound, Index* out) {
  uint64_t index = cursor.index, before = ~uint64_t{0};  // the one before, in the bitmap
  int64_t gap = 0;
  for (const uint8_t* at = rice.ones; at < rice.end; at += 8) {
    const uint64_t place = static_cast<uint64_t>(at - rice.ones) * 8;
    for (uint64_t word = Word::read(at, rice.end); word != 0; word &= word - 1) {
      if (gap == rice.gaps) return false;
      const uint64_t one = place + static_cast<uint64_t>(__builtin_ctzll(word));
      const uint64_t step = (one - before - 1) << rice.low | rice.low_of(gap);
      if (step >= bound - 1 - index) return false;
      before = one;
      index += step + 1;
      out[++gap] = static_cast<Index>(index);
    }
  }
  cursor = {index, gap + 1, rice.end};
  return gap == rice.gaps;
}

#if SHIRA_X86
// The ones of a bitmap, by the low byte of where each is: enough, unless there are 256 zeros in a row. False then
// (three words of zeros, at the least), and where there are not as many as gaps. ones[-1] is that of the place before
// the first.
constexpr int64_t kOnes = kBlock + 64;  // the last store may spill as much

// Gaps one by one, from `gap` on, once the ones are found.
template <typename Index>
inline void read_rice_rest(const Rice& rice, Cursor& cursor, const uint8_t* ones, int64_t gap, Index* out) {
  uint64_t index = cursor.index;
  for (; gap < rice.gaps; ++gap) {
    const uint64_t zeros = static_cast<uint8_t>(ones[gap] - ones[gap - 1] - 1);
    index += (zeros << rice.low | rice.low_of(gap)) + 1;
    out[gap + 1] = static_cast<Index>(index);
  }
  cursor = {index, gap + 1, rice.end};
}

template <typename Index>
SHIRA_AVX512 inline bool read_rice_avx512(const Rice& rice, Cursor& cursor, Index* out) {
  alignas(64) uint8_t room[64 + kOnes];
  uint8_t* const ones = room + 64;
  ones[-1] = 255;
  __m512i lane;
  {
    alignas(64) uint8_t count[64];
    for (int i = 0; i < 64; ++i) count[i] = static_cast<uint8_t>(i);
    lane = _mm512_load_si512(count);
  }
  int64_t found = 0;
  int empty = 0;
  for (const uint8_t* at = rice.ones; at < rice.end; at += 8) {
    const uint64_t word = Word::read(at, rice.end);
    const int64_t more = static_cast<int64_t>(_mm_popcnt_u64(word));
    empty = word == 0 ? empty + 1 : 0;
    if (found + more > rice.gaps || empty == 3) return false;
    const __m512i place = _mm512_add_epi8(lane, _mm512_set1_epi8(static_cast<char>((at - rice.ones) * 8)));
    _mm512_storeu_si512(ones + found, _mm512_maskz_compress_epi8(word, place));
    found += more;
  }
  if (found != rice.gaps) return false;

  // Low bits of lane i start at bit i * low: a window of four bytes, then a shift.
  const __m512i start = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(rice.low));
  const __m512i window = _mm512_add_epi32(
      _mm512_mullo_epi32(_mm512_srli_epi32(start, 3), _mm512_set1_epi32(0x01010101)), _mm512_set1_epi32(0x03020100));
  const __m512i shift = _mm512_and_si512(start, _mm512_set1_epi32(7));
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(rice.mask()));
  const __mmask64 bytes = (uint64_t{1} << 2 * rice.low) - 1;
  const __m128i low = _mm_cvtsi32_si128(rice.low), one_each = _mm_set1_epi8(1);
  const __m512i zero = _mm512_setzero_si512(), one = _mm512_set1_epi32(1), last_lane = _mm512_set1_epi32(15);
  const uint64_t base = cursor.index;
  __m512i reached = zero;
  int64_t gap = 0;
  const uint8_t* at = rice.lows;
  for (; gap + 16 <= rice.gaps; gap += 16, at += 2 * rice.low) {
    const __m512i packed = _mm512_permutexvar_epi8(window, _mm512_maskz_loadu_epi8(bytes, at));
    const __m512i lows = _mm512_and_si512(_mm512_srlv_epi32(packed, shift), mask);
    const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ones + gap));
    const __m128i before = _mm_loadu_si128(reinterpret_cast<const __m128i*>(ones + gap - 1));
    const __m128i zeros = _mm_sub_epi8(_mm_sub_epi8(here, before), one_each);
    const __m512i highs = _mm512_sll_epi32(_mm512_cvtepu8_epi32(zeros), low);
    __m512i sum = _mm512_add_epi32(_mm512_or_si512(highs, lows), one);
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 15));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 14));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 12));
    sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, zero, 8));
    store16(out + gap + 1, base, _mm512_add_epi32(sum, reached));
    reached = _mm512_add_epi32(reached, _mm512_permutexvar_epi32(last_lane, sum));
  }
  cursor.index = base + static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(reached)));
  read_rice_rest(rice, cursor, ones, gap, out);
  return true;
}

template <typename Index>
SHIRA_AVX2 inline bool read_rice_avx2(const Rice& rice, Cursor& cursor, Index* out) {
  alignas(64) uint8_t room[64 + kOnes];
  uint8_t* const ones = room + 64;
  ones[-1] = 255;
  int64_t found = 0;
  int empty = 0;
  for (const uint8_t* at = rice.ones; at < rice.end; at += 8) {
    uint64_t word = Word::read(at, rice.end);
    const int64_t more = static_cast<int64_t>(_mm_popcnt_u64(word));
    empty = word == 0 ? empty + 1 : 0;
    if (found + more > rice.gaps || empty == 3) return false;
    uint64_t place = static_cast<uint64_t>(at - rice.ones) * 8 % 256 * 0x0101010101010101u;
    for (int byte = 0; byte < 8; ++byte, word >>= 8, place += 0x0808080808080808u) {
      store(ones + found, load<uint64_t>(kCompress.lanes[word & 255]) + place);
      found += static_cast<int64_t>(_mm_popcnt_u32(static_cast<unsigned>(word & 255)));
    }
  }
  if (found != rice.gaps) return false;

  // Two halves of four lanes, each with sixteen bytes of its own: four bytes for a lane, then a shift.
  alignas(32) uint8_t bytes[32];
  alignas(32) uint32_t shifts[8];
  const int half = 4 * rice.low / 8;
  for (int i = 0; i < 8; ++i) {
    const int bit = i * rice.low - (i < 4 ? 0 : 8 * half);
    shifts[i] = static_cast<uint32_t>(bit % 8);
    for (int k = 0; k < 4; ++k) bytes[4 * i + k] = static_cast<uint8_t>(bit / 8 + k);
  }
  const __m256i window = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
  const __m256i shift = _mm256_load_si256(reinterpret_cast<const __m256i*>(shifts));
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(rice.mask())), one = _mm256_set1_epi32(1);
  const __m128i low = _mm_cvtsi32_si128(rice.low), one_each = _mm_set1_epi8(1);
  const uint64_t base = cursor.index;
  __m256i reached = _mm256_setzero_si256();
  int64_t gap = 0;
  const uint8_t* at = rice.lows;
  for (; gap + 8 <= rice.gaps && rice.limit - at >= half + 16; gap += 8, at += rice.low) {
    const __m256i packed =
        _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))),
                                _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + half)), 1);
    const __m256i lows = _mm256_and_si256(_mm256_srlv_epi32(_mm256_shuffle_epi8(packed, window), shift), mask);
    const __m128i here = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(ones + gap));
    const __m128i before = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(ones + gap - 1));
    const __m128i zeros = _mm_sub_epi8(_mm_sub_epi8(here, before), one_each);
    const __m256i highs = _mm256_sll_epi32(_mm256_cvtepu8_epi32(zeros), low);
    __m256i sum = _mm256_add_epi32(_mm256_or_si256(highs, lows), one);
    sum = _mm256_add_epi32(sum, _mm256_slli_si256(sum, 4));
    sum = _mm256_add_epi32(sum, _mm256_slli_si256(sum, 8));
    const __m256i low_total = _mm256_permutevar8x32_epi32(sum, _mm256_set1_epi32(3));
    sum = _mm256_add_epi32(sum, _mm256_blend_epi32(_mm256_setzero_si256(), low_total, 0xF0));
    store8(out + gap + 1, base, _mm256_add_epi32(sum, reached));
    reached = _mm256_add_epi32(reached, _mm256_permutevar8x32_epi32(sum, _mm256_set1_epi32(7)));
  }
  cursor.index = base + static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(reached)));
  read_rice_rest(rice, cursor, ones, gap, out);
  return true;
}
#endif  // SHIRA_X86

template <typename Index>
inline bool read_rice_payload(const Rice& rice, Cursor& cursor, uint64_t bound, Index* out, Width width) {
  if (!rice.is_padded()) return false;
#if SHIRA_X86
  // Lanes hold positions relative to the block's first index, mod 2^32.
  if (width != Width::Portable && rice.bits() + static_cast<uint64_t>(kBlock) < (uint64_t{1} << 32) >> rice.low) {
    if (width == Width::Avx512 ? read_rice_avx512(rice, cursor, out) : read_rice_avx2(rice, cursor, out)) return true;
  }
#endif
  (void)width;
  return read_rice(rice, cursor, bound, out);
}

}  // namespace detail

// One block of a code that holds() into out[0 .. its length). False if anything about it is wrong: where its
// payload starts and ends, its mode, its gaps, an index of it, or the next block's first index.
template <typename Index>
inline bool decode_block(const Code& code, int64_t block, Index* out, Width width) {
  const int64_t n = block_length(code.count, block);
  const bool last = block + 1 == code.blocks();
  const uint64_t payload = static_cast<uint64_t>(code.payload_bytes()), bound = code.bound();
  const uint64_t first = code.first(block), place = code.place(block);
  const uint64_t start = place & kStartMask, end = last ? payload : code.place(block + 1) & kStartMask;
  if (block == 0 && start != 0) return false;
  if (end > payload || start > end || (!last && start == end) || first >= bound) return false;
  out[0] = static_cast<Index>(first);
  const uint8_t* base = code.data + code.anchors();
  const uint8_t* stop = base + end;
  detail::Cursor cursor{first, 1, base + start};
  switch (place >> 56) {
    case kBytes: detail::read_payload<uint8_t>(cursor, n, stop, out, width); break;
    case kShorts: detail::read_payload<uint16_t>(cursor, n, stop, out, width); break;
    case kWords:
      if (!detail::read_words(cursor, n, stop, bound, out)) return false;
      break;
    default: {
      const uint64_t low = (place >> 56) - kRice;
      if (low > static_cast<uint64_t>(kMostLow)) return false;
      detail::Rice rice{static_cast<int>(low), n - 1, cursor.at, nullptr, stop, code.data + code.bytes};
      rice.ones = rice.lows + std::min<int64_t>(low_bytes(n - 1, rice.low), stop - cursor.at);
      if (!detail::read_rice_payload(rice, cursor, bound, out, width)) return false;
      break;
    }
  }
  return cursor.written == n && cursor.at == stop && cursor.index < bound &&
         (last || code.first(block + 1) > cursor.index);
}

#endif  // !defined(__CUDACC__)

}  // namespace shira::core::codec
