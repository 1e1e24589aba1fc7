// The code of a list of small numbers: whole, of either sign, most of them near 0, some of any size of their type. An
// update's values are stored so, as differences from what they replace. This is the only encoder and the only decoder;
// docs/format.md describes the format in prose.
//
// Blocks of 4096 numbers, the last one shorter. The code is an anchor of 8 bytes for each block, a u64 of
// mode << 56 | where its payload starts, in bytes from the end of the anchors; then the payloads back to back.
// A number d becomes z: 2d, or -2d - 1 where d < 0; less 1 where bit 6 of the mode is set, which is where the block has
// no 0. Mode & 63 is k, how many low bits of every z are stored as they are. What is above them, v = z >> k, is stored
// by its length c: 0 of 0, 1 of 1, 2 of 2 and 3, ... A payload has three parts, each padded with zeros to a byte:
//   the low k bits of each z
//   a bitmap: for each z as many zeros as c, then a one
//   the c - 1 bits of each v below its highest
// Bits count from the lowest of each byte. The encoder takes the k that makes the payload the shortest, the lowest of
// those. The decoder trusts nothing.
#pragma once
#include <algorithm>
#include <cstring>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "codec.h"

namespace shira::core::numbers {

using codec::load;
using codec::store;
using codec::Word;

constexpr int64_t kBlock = codec::kBlock;
constexpr int64_t kAnchorBytes = 8;
constexpr int kMostLow = 56;           // bits: where they start in a byte, too, they end in the next eight
constexpr uint64_t kNoZeros = 1 << 6;  // of a mode

inline int64_t block_count(int64_t count) { return codec::block_count(count); }

// The fewest bytes for so many numbers: each has a bit that ends it.
inline int64_t fewest_bytes(int64_t count) {
  const int64_t blocks = block_count(count);
  return blocks * kAnchorBytes +
         (count > 0 ? (blocks - 1) * (kBlock / 8) + (count - (blocks - 1) * kBlock + 7) / 8 : 0);
}

template <typename Number>
constexpr int kBits = 8 * sizeof(Number);

template <typename Number>
inline uint64_t zigzag(Number number) {
  using Bits = std::make_unsigned_t<Number>;
  const Bits sign = number < 0 ? static_cast<Bits>(~Bits{0}) : Bits{0};
  return static_cast<Bits>(static_cast<Bits>(static_cast<Bits>(number) << 1) ^ sign);
}
template <typename Number>
inline Number unzigzag(uint64_t z) {
  return static_cast<Number>(z >> 1 ^ (0 - (z & 1)));
}
inline int length_of(uint64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(x); }

// Bits one after the other.
class Writer {
 public:
  explicit Writer(uint8_t* at) : at_(at) {}
  // `bits` has `width` of them, at most 63, and nothing above.
  void put(uint64_t bits, int width) {
    if (width > 32) {
      put(bits & 0xFFFFFFFFu, 32);
      bits >>= 32;
      width -= 32;
    }
    pending_ |= bits << held_;
    held_ += width;
    if (held_ < 32) return;
    store(at_, static_cast<uint32_t>(pending_));
    at_ += 4;
    pending_ >>= 32;
    held_ -= 32;
  }
  void put_length(int length) {
    for (; length > 31; length -= 32) put(0, 32);
    put(uint64_t{1} << length, length + 1);
  }
  void pad() {
    for (; held_ > 0; held_ -= 8, pending_ >>= 8) *at_++ = static_cast<uint8_t>(pending_);
  }

 private:
  uint8_t* at_;
  uint64_t pending_ = 0;
  int held_ = 0;
};

template <typename Number>
inline std::vector<uint8_t> encode(const Number* numbers, int64_t count) {
  const int64_t blocks = block_count(count);
  std::vector<uint8_t> code(static_cast<size_t>(blocks * kAnchorBytes));
  std::vector<uint64_t> z(static_cast<size_t>(std::min(count, kBlock)));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t n = codec::block_length(count, block);
    const Number* from = numbers + block * kBlock;
    const bool zeros = std::find(from, from + n, Number{0}) != from + n;
    int64_t lengths[65] = {};
    for (int64_t i = 0; i < n; ++i) {
      z[i] = zigzag(from[i]) - (zeros ? 0 : 1);
      ++lengths[length_of(z[i])];
    }
    int low = 0;
    int64_t fewest = 0, ones = 0, rests = 0;  // bits
    for (int k = 0; k <= std::min(kBits<Number> - 1, kMostLow); ++k) {
      int64_t bitmap = n, rest = 0;
      for (int length = k + 1; length <= 64; ++length) {
        bitmap += lengths[length] * (length - k);
        rest += lengths[length] * (length - k - 1);
      }
      const int64_t bits = n * k + bitmap + rest;
      if (k > 0 && bits >= fewest) continue;
      low = k, fewest = bits, ones = bitmap, rests = rest;
    }
    const uint64_t start = code.size() - static_cast<size_t>(blocks * kAnchorBytes);
    const uint64_t mode = static_cast<uint64_t>(low) | (zeros ? 0 : kNoZeros);
    store(code.data() + block * kAnchorBytes, mode << 56 | start);
    code.resize(code.size() + static_cast<size_t>(codec::low_bytes(n, low) + (ones + 7) / 8 + (rests + 7) / 8));
    uint8_t* const at = code.data() + blocks * kAnchorBytes + start;
    uint8_t* const bitmap = at + codec::low_bytes(n, low);
    Writer lows(at), lengths_of(bitmap), rest(bitmap + (ones + 7) / 8);
    const uint64_t mask = (uint64_t{1} << low) - 1;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t v = z[i] >> low;
      const int length = length_of(v);
      lows.put(z[i] & mask, low);
      lengths_of.put_length(length);
      if (length > 1) rest.put(v & ~(uint64_t{1} << (length - 1)), length - 1);
    }
    lows.pad();
    lengths_of.pad();
    rest.pad();
  }
  return code;
}

// What a decoder has found wrong, as the end of a sentence.
struct Fault {
  std::string what;
  int64_t byte = 0;
};

namespace detail {

// `width` bits from bit `at` on, of the bytes [data, end), with zeros after them.
inline uint64_t bits_at(const uint8_t* data, const uint8_t* end, uint64_t at, int width) {
  const int shift = static_cast<int>(at % 8);
  uint64_t bits = Word::read(data + at / 8, end) >> shift;
  if (width + shift > 64) bits |= Word::read(data + at / 8 + 8, end) << (64 - shift);
  return width < 64 ? bits & ((uint64_t{1} << width) - 1) : bits;
}
// Whether the bits of the byte before `end` that are past bit `used` of a part are zeros.
inline bool padded(const uint8_t* end, uint64_t used) { return used % 8 == 0 || end[-1] >> used % 8 == 0; }

}  // namespace detail

// One block of a code of at least fewest_bytes(count), into out[0 .. its length).
template <typename Number>
inline bool decode_block(const uint8_t* code, int64_t bytes, int64_t count, int64_t block, Number* out, Fault& fault) {
  const int64_t blocks = block_count(count), n = codec::block_length(count, block), anchors = blocks * kAnchorBytes;
  const uint64_t payload = static_cast<uint64_t>(bytes - anchors), place = load<uint64_t>(code + block * kAnchorBytes);
  const bool last = block + 1 == blocks;
  const uint64_t start = place & codec::kStartMask;
  const uint64_t end = last ? payload : load<uint64_t>(code + (block + 1) * kAnchorBytes) & codec::kStartMask;
  const auto wrong = [&](const uint8_t* at, const auto&... text) {
    std::ostringstream all;
    ((all << text), ...);
    fault = {all.str(), at - code};
    return false;
  };
  if (block == 0 && start != 0) return wrong(code, "have its first payload at offset 0, got ", start);
  if (end > payload || start >= end)
    return wrong(code + (last ? block : block + 1) * kAnchorBytes, "have increasing payload offsets within its ",
                 payload, " payload bytes, got ", end, " after ", start);
  const uint64_t mode = place >> 56;
  const int low = static_cast<int>(mode & (kNoZeros - 1));
  if (mode >= 2 * kNoZeros || low > std::min(kBits<Number> - 1, kMostLow))
    return wrong(code + block * kAnchorBytes + 7, "have modes of at most ", std::min(kBits<Number> - 1, kMostLow),
                 " low bits, got mode ", mode);
  constexpr uint64_t kMost = std::make_unsigned_t<Number>(~uint64_t{0});
  const uint64_t less = mode & kNoZeros ? 1 : 0;
  const uint8_t *const lows = code + anchors + start, *const stop = code + anchors + end;
  if (stop - lows < codec::fewest_rice(n, low))
    return wrong(lows, "have at least ", codec::fewest_rice(n, low), " bytes in a payload of ", n, " numbers in mode ",
                 mode, ", got ", end - start);
  const uint8_t* const ones = lows + codec::low_bytes(n, low);
  if (!detail::padded(ones, static_cast<uint64_t>(n) * static_cast<uint64_t>(low)))
    return wrong(ones - 1, "have zeros where a payload's parts are padded, got a one");

  // The bitmap first, since the third part starts where it ends: the lengths are kept in `out` until then.
  int64_t found = 0;
  uint64_t before = ~uint64_t{0};
  for (const uint8_t* at = ones; at < stop && found < n; at += 8) {
    const uint64_t first = static_cast<uint64_t>(at - ones) * 8;
    for (uint64_t word = Word::read(at, stop); word != 0 && found < n; word &= word - 1) {
      const uint64_t one = first + static_cast<uint64_t>(__builtin_ctzll(word)), length = one - before - 1;
      if (length > static_cast<uint64_t>(kBits<Number> - low))
        return wrong(ones + one / 8, "have numbers that fit int", kBits<Number>, ", got one of ", length, " and ", low,
                     " bits");
      out[found++] = static_cast<Number>(length);
      before = one;
    }
  }
  if (found < n) return wrong(stop, "have ", n, " numbers in a payload, got ", found, " by its end");
  const uint8_t* const rest = ones + (before + 8) / 8;
  if (!detail::padded(rest, before + 1))
    return wrong(rest - 1, "have zeros where a payload's parts are padded, got a one");
  uint64_t used = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int length = static_cast<int>(out[i]), width = length > 1 ? length - 1 : 0;
    const uint64_t top = length > 0 ? uint64_t{1} << (length - 1) : 0;
    const uint64_t v = top | detail::bits_at(rest, stop, used, width);
    used += static_cast<uint64_t>(width);
    const uint64_t bits = detail::bits_at(lows, stop, static_cast<uint64_t>(i * low), low);
    const uint64_t z = v << low | bits;
    if (less != 0 && z == kMost) return wrong(lows, "have numbers that fit int", kBits<Number>, ", got one past them");
    out[i] = unzigzag<Number>(z + less);
  }
  const uint64_t rest_bytes = (used + 7) / 8, left = static_cast<uint64_t>(stop - rest);
  if (rest_bytes != left) return wrong(rest, "have ", rest_bytes, " bytes in the last part of a payload, got ", left);
  if (!detail::padded(stop, used)) return wrong(stop - 1, "have zeros where a payload's parts are padded, got a one");
  return true;
}

}  // namespace shira::core::numbers
