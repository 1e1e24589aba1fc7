// Which granules a mask takes, once for every device: the order of scores, and the frozen random choice.
#pragma once
#include "arithmetic.h"
#include "splitmix.h"

namespace shira::core {

enum class Score { Magnitude, Grad, Snip };

SHIRA_HD float magnitude(float x) { return bits_to<float>(bits_to<uint32_t>(x) & 0x7FFFFFFFu); }
SHIRA_HD double magnitude(double x) { return bits_to<double>(bits_to<uint64_t>(x) & 0x7FFFFFFFFFFFFFFFull); }

// The score of one entry: |w|, |g| or |w * g|. A granule's score is the sum of its entries', in their order.
template <typename W, typename G, Score score>
SHIRA_HD typename W::Compute entry_score(const typename W::Bits* weight, const typename G::Bits* grad, int64_t i) {
  using C = typename W::Compute;
  if constexpr (score == Score::Magnitude) {
    return magnitude(W::load(weight[i]));
  } else {
    const C g = static_cast<C>(G::load(grad[i]));
    return magnitude(score == Score::Grad ? g : W::load(weight[i]) * g);
  }
}

// Scores are never negative, so the order of their bits is their own. NaN has key 0: it comes after a score of zero,
// and NaNs tie with each other. Keys are never negative either, so signed comparisons (all that AVX2 has) are enough.
SHIRA_HD int32_t score_key(float score) {
  const int32_t bits = bits_to<int32_t>(score) & 0x7FFFFFFF;
  return bits > 0x7F800000 ? 0 : bits + 1;
}
SHIRA_HD int64_t score_key(double score) {
  const int64_t bits = bits_to<int64_t>(score) & 0x7FFFFFFFFFFFFFFFll;
  return bits > 0x7FF0000000000000ll ? 0 : bits + 1;
}
template <typename Compute>
using Key = decltype(score_key(Compute{}));

// A keyed permutation of [0, 2^bits), the smallest power of two that holds the domain (at least 4): a Feistel
// network of eight splitmix64 rounds over a high and a low half. An image outside the domain is permuted again until it
// lies inside; that makes it a permutation of the domain, and the images of 0 .. k-1 are k distinct granules. It is
// frozen: a seed may stand for a mask in a file.
struct Permutation {
  static constexpr int kRounds = 8;
  uint64_t keys[kRounds], domain;
  int low, high;

  SHIRA_HD Permutation(uint64_t domain, uint64_t seed) : domain(domain) {
    int bits = 2;
    while (bits < 64 && ((domain - 1) >> bits) != 0) ++bits;
    low = bits / 2;
    high = bits - low;
    for (int r = 0; r < kRounds; ++r) keys[r] = splitmix64(seed + static_cast<uint64_t>(r + 1) * kGolden);
  }

  SHIRA_HD uint64_t operator()(uint64_t x) const {
    uint64_t right = x & ((uint64_t{1} << low) - 1), left = x >> low;
    for (int r = 0; r < kRounds; r += 2) {
      left ^= splitmix64(right ^ keys[r]) >> (64 - high);
      right ^= splitmix64(left ^ keys[r + 1]) >> (64 - low);
    }
    return left << low | right;
  }
};

}  // namespace shira::core
