// The plan of several adapters over one weight, and how their shares of an entry sum up, once for every device.
#pragma once
#include "arithmetic.h"

namespace shira::core {

// The union's granules are planned in groups of 64. A group has one source for each adapter that changes any of it: the
// source's members are bits that say which, and the adapter's granules for them follow one another in its values.
constexpr int64_t kGroup = 64;
SHIRA_HD int64_t groups_of(int64_t granules) { return (granules + kGroup - 1) / kGroup; }

SHIRA_HD int64_t count_of(uint64_t members) {
#if defined(__CUDA_ARCH__)
  return __popcll(members);
#else  // plain arithmetic: loops over it vectorise, and the oldest x86-64 has no instruction for it
  members -= members >> 1 & 0x5555555555555555u;
  members = (members & 0x3333333333333333u) + (members >> 2 & 0x3333333333333333u);
  members = (members + (members >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
  members += members >> 8;  // a product would add the bytes too, but vectors of 64-bit products are slow
  members += members >> 16;
  return static_cast<int64_t>((members + (members >> 32)) & 0x7Fu);
#endif
}
SHIRA_HD bool is_member(uint64_t members, int64_t granule) { return (members >> (granule % kGroup) & 1) != 0; }
// How many members come before this granule of the union.
SHIRA_HD int64_t members_before(uint64_t members, int64_t granule) {
  return count_of(members & ((uint64_t{1} << (granule % kGroup)) - 1));
}

// A source names an adapter and a granule of its values: adapter << 48 | position. 15 bits are left for the adapter.
constexpr int kPositionBits = 48;
constexpr int64_t kPositionMask = (int64_t{1} << kPositionBits) - 1;
constexpr int64_t kMostAdapters = 32767;

SHIRA_HD int64_t source_of(int64_t adapter, int64_t position) { return adapter << kPositionBits | position; }
SHIRA_HD int64_t adapter_of(int64_t source) { return source >> kPositionBits; }
SHIRA_HD int64_t position_of(int64_t source) { return source & kPositionMask; }

// total + alpha*d, where d is the value itself (delta) or what it differs from the base by.
template <typename C>
SHIRA_HD C add_wide(C total, C base, C value, C alpha, bool delta) {
  return total + alpha * (delta ? value : value - base);
}
template <typename W, typename V>
SHIRA_HD typename W::Compute add_share(typename W::Compute total, typename W::Bits base, typename V::Bits value,
                                       typename W::Compute alpha, bool delta) {
  using C = typename W::Compute;
  return add_wide<C>(total, W::load(base), static_cast<C>(V::load(value)), alpha, delta);
}

// An entry that one adapter alone changes: what apply_ makes of it, with the rule known at run time.
template <typename W, typename V>
SHIRA_HD typename W::Bits mix_by(Rule rule, typename W::Bits base, typename V::Bits value, typename W::Compute alpha) {
  const auto mixed = W::store(add_share<W, V>(W::load(base), base, value, alpha, rule == Rule::Delta));
  const auto exact = convert<W, V>(value);
  return rule == Rule::Keep ? base : rule == Rule::Overwrite ? exact : mixed;
}

// Neighbouring entries of a granule, changed by the same adapters, which are added in order. Those of strength 0 do not
// count; a single one is exact where apply_ is.
template <typename W, typename V, int kEntries = 1>
class FusedEntries {
 public:
  SHIRA_HD explicit FusedEntries(const typename W::Bits* base) {
    for (int e = 0; e < kEntries; ++e) total_[e] = W::load(base_[e] = base[e]);
  }
  SHIRA_HD void add(Rule rule, const typename V::Bits* values, typename W::Compute alpha) {
    if (rule == Rule::Keep) return;
    for (int e = 0; e < kEntries; ++e) {
      total_[e] = add_share<W, V>(total_[e], base_[e], values[e], alpha, rule == Rule::Delta);
      value_[e] = values[e];
    }
    only_ = count_++ == 0 ? rule : Rule::Blend;
  }
  SHIRA_HD void result(typename W::Bits* entries) const {
    for (int e = 0; e < kEntries; ++e)
      entries[e] = count_ == 0 ? base_[e] : only_ == Rule::Overwrite ? convert<W, V>(value_[e]) : W::store(total_[e]);
  }

 private:
  typename W::Bits base_[kEntries];
  typename W::Compute total_[kEntries];
  typename V::Bits value_[kEntries] = {};
  Rule only_ = Rule::Keep;
  int64_t count_ = 0;
};

}  // namespace shira::core
