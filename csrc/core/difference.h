// Where two buffers of one length differ, entry by entry, by their bits: so NaNs with other payloads differ, and so
// do 0.0 and -0.0.
#pragma once
#include <cstdint>
#include <cstring>

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

// The entries of [begin, end) that differ, counted from `begin`, into room for all of them; returns how many.
template <typename Unit>
inline int64_t differing(const uint8_t* one, const uint8_t* two, int64_t begin, int64_t end, int32_t* out) {
  constexpr int64_t kLine = 64 / sizeof(Unit), kWord = 8 / sizeof(Unit), kWords = 8;
  int64_t found = 0, i = begin;
  // No branch on an entry: which one of a word differs is anybody's guess.
  const auto take = [&](int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      out[found] = static_cast<int32_t>(k - begin);
      found += detail::unit_at<Unit>(one, k) != detail::unit_at<Unit>(two, k);
    }
  };
  for (; i + kLine <= end; i += kLine) {
    const uint8_t* a = one + i * static_cast<int64_t>(sizeof(Unit));
    const uint8_t* b = two + i * static_cast<int64_t>(sizeof(Unit));
    uint64_t any = 0;
    for (int64_t w = 0; w < kWords; ++w) any |= detail::unit_at<uint64_t>(a, w) ^ detail::unit_at<uint64_t>(b, w);
    if (any == 0) continue;
    for (int64_t w = 0; w < kWords; ++w)
      if (detail::unit_at<uint64_t>(a, w) != detail::unit_at<uint64_t>(b, w)) take(i + w * kWord, i + (w + 1) * kWord);
  }
  take(i, end);
  return found;
}

}  // namespace shira::core
