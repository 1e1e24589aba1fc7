// The plan of several adapters over one weight, and how their shares of an entry sum up, once for every device.
#pragma once
#include "arithmetic.h"

namespace shira::core {

// A source names an adapter and a granule of its values: adapter << 48 | position. 15 bits are left for the adapter.
constexpr int kPositionBits = 48;
constexpr int64_t kPositionMask = (int64_t{1} << kPositionBits) - 1;
constexpr int64_t kMostAdapters = 32767;

SHIRA_HD int64_t source_of(int64_t adapter, int64_t position) { return adapter << kPositionBits | position; }
SHIRA_HD int64_t adapter_of(int64_t source) { return source >> kPositionBits; }
SHIRA_HD int64_t position_of(int64_t source) { return source & kPositionMask; }

// total + alpha*d, where d is the value itself (delta) or what it differs from the base by.
template <typename W, typename V>
SHIRA_HD typename W::Compute add_share(typename W::Compute total, typename W::Bits base, typename V::Bits value,
                                       typename W::Compute alpha, bool delta) {
  using C = typename W::Compute;
  const C b = W::load(base), v = static_cast<C>(V::load(value));
  return total + alpha * (delta ? v : v - b);
}

// An entry that one adapter alone changes: what apply_ makes of it, with the rule known at run time.
template <typename W, typename V>
SHIRA_HD typename W::Bits mix_by(Rule rule, typename W::Bits base, typename V::Bits value, typename W::Compute alpha) {
  const auto mixed = W::store(add_share<W, V>(W::load(base), base, value, alpha, rule == Rule::Delta));
  const auto exact = convert<W, V>(value);
  return rule == Rule::Keep ? base : rule == Rule::Overwrite ? exact : mixed;
}

// An entry that any number of adapters change, added in their order. Those of strength 0 are left out, and one alone is
// exact where apply_ is exact.
template <typename W, typename V>
class FusedEntry {
 public:
  SHIRA_HD explicit FusedEntry(typename W::Bits base) : base_(base), total_(W::load(base)) {}
  SHIRA_HD void add(Rule rule, typename V::Bits value, typename W::Compute alpha) {
    if (rule == Rule::Keep) return;
    total_ = add_share<W, V>(total_, base_, value, alpha, rule == Rule::Delta);
    value_ = value;
    only_ = count_++ == 0 ? rule : Rule::Blend;
  }
  SHIRA_HD typename W::Bits result() const {
    if (count_ == 0) return base_;
    return only_ == Rule::Overwrite ? convert<W, V>(value_) : W::store(total_);
  }

 private:
  typename W::Bits base_;
  typename W::Compute total_;
  typename V::Bits value_ = 0;
  Rule only_ = Rule::Keep;
  int64_t count_ = 0;
};

}  // namespace shira::core
