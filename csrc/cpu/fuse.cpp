// The fuse family on the CPU: fuse_plan merges the adapters' sorted lists, fuse_ walks the union group by group.
#include "../core/fuse.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <functional>
#include <memory>

#include "../dispatch.h"
#include "../ops/fuse.h"
#include "vector.h"
#include "walk.h"

namespace shira::cpu {
namespace {

// ---- fuse_plan -----------------------------------------------------------------------------------------

constexpr int64_t kShare = 8192;  // entries that are merged at a time: the two buffers of a share stay in L2

// An entry of a list as one number. The high half is its index, counted from the share's lowest; the low half is its
// place among the share's entries, list after list. So a comparison keeps the adapters' order, and all keys differ.
template <typename Key>
constexpr int kHalf = 4 * sizeof(Key);  // bits
using Narrow = uint64_t;
using Wide = unsigned __int128;  // for a share whose indices lie further apart than 32 bits hold

// Merges two runs, from both ends at once: each comparison waits for the one before, so two chains take half the time.
template <typename Key>
inline void merge(const Key* left, const Key* middle, const Key* end, Key* out) {
  const Key *right = middle, *left_end = middle, *right_end = end;
  Key* out_end = out + (end - left);
  for (int64_t step; (step = std::min(left_end - left, right_end - right)) > 0;)  // as far as no run can end
    for (; step > 0; --step) {
      const bool from_right = *right < *left;
      *out++ = from_right ? *right : *left;
      right += from_right;
      left += !from_right;
      const bool from_left = right_end[-1] < left_end[-1];
      *--out_end = from_left ? left_end[-1] : right_end[-1];
      left_end -= from_left;
      right_end -= !from_left;
    }
  std::copy(right, right_end, std::copy(left, left_end, out));
}

// Merges the runs that end at `ends`, neighbours with neighbours, until there is one.
template <typename Key>
inline const Key* merge_all(Key* keys, Key* spare, std::vector<int64_t>& ends) {
  while (ends.size() > 1) {
    size_t kept = 0;
    int64_t begin = 0;
    for (size_t r = 0; r < ends.size(); r += 2) {
      const size_t last = std::min(r + 1, ends.size() - 1);
      merge(keys + begin, keys + ends[r], keys + ends[last], spare + begin);
      begin = ends[kept++] = ends[last];
    }
    ends.resize(kept);
    std::swap(keys, spare);
  }
  return keys;
}

template <typename T>
std::unique_ptr<T[]> room(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

// f(position of the bit) for every bit that is set, in order.
template <typename F>
SHIRA_INLINE void each_member(uint64_t members, F&& f) {
  for (; members != 0; members &= members - 1) f(std::countr_zero(members));
}

// One share's part of the union: the entries [from[k], to[k]) of each list k, n together, none below `lowest`. Writes
// the union's indices, and for each entry, list after list, its place among them. Returns how many they are. By a
// merge:
template <typename Key, typename I, typename P>
int64_t unite_far(const Tensors& lists, const int64_t* from, const int64_t* to, int64_t lowest, int64_t n, I* entries,
                  P* places) {
  const auto keys = room<Key>(n), spare = room<Key>(n);
  std::vector<int64_t> runs;
  int64_t filled = 0;
  for (size_t k = 0; k < lists.size(); ++k) {
    if (from[k] == to[k]) continue;
    with_index(lists[k].scalar_type(), [&](auto type) {
      const auto* list = lists[k].const_data_ptr<typename decltype(type)::type>();
      for (int64_t at = from[k]; at < to[k]; ++at, ++filled)
        keys[filled] = static_cast<Key>(list[at] - lowest) << kHalf<Key> | static_cast<Key>(filled);
    });
    runs.push_back(filled);
  }
  const Key* const merged = merge_all(keys.get(), spare.get(), runs);
  constexpr Key kBelow = ~Key{0} >> kHalf<Key>;
  int64_t u = -1;
  Key last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key index = merged[i] >> kHalf<Key>;
    u += i == 0 || index != last;
    last = index;
    entries[u] = static_cast<I>(lowest + static_cast<int64_t>(index));
    places[static_cast<int64_t>(merged[i] & kBelow)] = static_cast<P>(u);
  }
  return u + 1;
}

// The same by a bit for each index in the share's range, of `words` words: faster while there are few for an entry.
template <typename I, typename P>
int64_t unite_near(const Tensors& lists, const int64_t* from, const int64_t* to, int64_t lowest, int64_t words,
                   I* entries, P* places) {
  const auto bits = std::make_unique<uint64_t[]>(words);
  const auto before = room<P>(words);
  const auto each = [&](const auto& f) {
    for (size_t k = 0; k < lists.size(); ++k) {
      if (from[k] == to[k]) continue;
      with_index(lists[k].scalar_type(), [&](auto type) {
        const auto* list = lists[k].const_data_ptr<typename decltype(type)::type>();
        for (int64_t at = from[k]; at < to[k]; ++at) f(static_cast<uint64_t>(list[at] - lowest));
      });
    }
  };
  each([&](uint64_t x) { bits[x / 64] |= uint64_t{1} << (x % 64); });
  int64_t u = 0;
  for (int64_t w = 0; w < words; ++w) {
    before[w] = static_cast<P>(u);
    each_member(bits[w], [&](int bit) SHIRA_INLINE_LAMBDA { entries[u++] = static_cast<I>(lowest + 64 * w + bit); });
  }
  each([&](uint64_t x) {
    *places++ = before[x / 64] + static_cast<P>(core::count_of(bits[x / 64] & ((uint64_t{1} << (x % 64)) - 1)));
  });
  return u;
}

struct Source {
  int64_t group, source;
  uint64_t members;
};

// The sources of the union's groups [begin, end), list after list. `places` are the places of all entries in the union;
// those of list k begin at `starts[k]`.
template <typename P>
std::vector<Source> find_sources(const P* places, const std::vector<int64_t>& starts, int64_t begin, int64_t end) {
  std::vector<Source> found;
  for (size_t k = 0; k + 1 < starts.size(); ++k) {
    const P *const list = places + starts[k], *const list_end = places + starts[k + 1];
    for (const P* at = std::lower_bound(list, list_end, begin * core::kGroup); at < list_end;) {
      const int64_t group = *at / core::kGroup;
      if (group >= end) break;
      const P* const first = at;
      const P* const last = at + std::min<int64_t>(core::kGroup, list_end - at);
      uint64_t members = 0;
      for (; at < last && *at < (group + 1) * core::kGroup; ++at) members |= uint64_t{1} << (*at & (core::kGroup - 1));
      found.push_back({group, core::source_of(static_cast<int64_t>(k), first - list), members});
    }
  }
  return found;
}

// The union in shares: ranges of indices, each of which takes its part of every list. Then the sources, group by group.
template <typename I, typename P>
std::tuple<Tensor, Tensor, Tensor, Tensor> make_plan(const Tensors& lists, const std::vector<int64_t>& starts,
                                                     ScalarType index, ScalarType offset) {
  const int64_t adapters = static_cast<int64_t>(lists.size()), total = starts.back();
  const Tensor& longest = *std::max_element(lists.begin(), lists.end(),
                                            [](const Tensor& a, const Tensor& b) { return a.numel() < b.numel(); });
  // Not more bounds than entries, however many adapters there are.
  const int64_t shares = std::min(total / std::max(kShare, adapters) + 1, std::max<int64_t>(1, longest.numel()));
  std::vector<int64_t> bounds((shares + 1) * adapters);  // where each share begins in each list
  std::vector<int64_t> firsts(shares + 1), unions(shares + 1);
  for (int64_t s = 0; s <= shares; ++s)
    for (int64_t k = 0; k < adapters; ++k) {
      with_index(lists[k].scalar_type(), [&](auto type) {
        using L = typename decltype(type)::type;
        const L* list = lists[k].const_data_ptr<L>();
        int64_t& bound = bounds[s * adapters + k];
        if (s == 0 || s == shares) {
          bound = s == 0 ? 0 : lists[k].numel();
        } else {
          const int64_t at = s * longest.numel() / shares;
          const int64_t cut = longest.scalar_type() == ScalarType::Int ? longest.const_data_ptr<int32_t>()[at]
                                                                       : longest.const_data_ptr<int64_t>()[at];
          bound = std::lower_bound(list, list + lists[k].numel(), cut) - list;
        }
        firsts[s] += bound;
      });
    }

  // As long as all lists together: only the merge tells how many entries the union has.
  const auto entries = room<I>(total);
  const auto in_shares = room<P>(total), places = room<P>(total);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t *from = &bounds[s * adapters], *to = from + adapters;
      int64_t lowest = INT64_MAX, highest = 0;
      for (int64_t k = 0; k < adapters; ++k) {
        if (from[k] == to[k]) continue;
        with_index(lists[k].scalar_type(), [&](auto type) {
          const auto* list = lists[k].const_data_ptr<typename decltype(type)::type>();
          lowest = std::min<int64_t>(lowest, list[from[k]]);
          highest = std::max<int64_t>(highest, list[to[k] - 1]);
        });
      }
      const int64_t n = firsts[s + 1] - firsts[s];
      const int64_t words = (highest - lowest) / 64 + 1;
      const bool near = n > 0 && words <= 2 * n, narrow = highest - lowest <= UINT32_MAX && n <= UINT32_MAX;
      I* const to_entries = entries.get() + firsts[s];
      P* const to_places = in_shares.get() + firsts[s];
      unions[s + 1] = near ? unite_near(lists, from, to, lowest, words, to_entries, to_places)
                           : (narrow ? unite_far<Narrow, I, P> : unite_far<Wide, I, P>)(lists, from, to, lowest, n,
                                                                                        to_entries, to_places);
    }
  });
  for (int64_t s = 0; s < shares; ++s) unions[s + 1] += unions[s];

  const int64_t size = unions[shares], groups = core::groups_of(size);
  Tensor indices = torch::stable::new_empty(lists[0], {size}, index);
  I* const to = indices.mutable_data_ptr<I>();
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      std::copy_n(entries.get() + firsts[s], unions[s + 1] - unions[s], to + unions[s]);
      const P* own = in_shares.get() + firsts[s];
      for (int64_t k = 0; k < adapters; ++k) {
        const int64_t from = bounds[s * adapters + k], n = bounds[(s + 1) * adapters + k] - from;
        std::transform(own, own + n, places.get() + starts[k] + from,
                       [first = static_cast<P>(unions[s])](P place) { return first + place; });
        own += n;
      }
    }
  });

  Tensor offsets = torch::stable::new_empty(lists[0], {groups + 1}, offset);
  P* const cuts = offsets.mutable_data_ptr<P>();
  std::fill_n(cuts, groups + 1, P{0});
  // A search in every list for each step, so not more steps than entries.
  const int64_t step = std::max(kShare, adapters) / core::kGroup, steps = (groups + step - 1) / step;
  std::vector<std::vector<Source>> found(steps);
  torch::stable::parallel_for(0, steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      found[s] = find_sources(places.get(), starts, s * step, std::min(groups, (s + 1) * step));
      for (const Source& one : found[s]) ++cuts[one.group + 1];
    }
  });
  for (int64_t g = 0; g < groups; ++g) cuts[g + 1] += cuts[g];
  Tensor sources = torch::stable::new_empty(lists[0], {cuts[groups]}, ScalarType::Long);
  Tensor members = torch::stable::new_empty(lists[0], {cuts[groups]}, ScalarType::Long);
  int64_t* const to_sources = sources.mutable_data_ptr<int64_t>();
  int64_t* const to_members = members.mutable_data_ptr<int64_t>();
  torch::stable::parallel_for(0, steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      std::vector<P> next(cuts + s * step, cuts + std::min(groups, (s + 1) * step));
      for (const Source& one : found[s]) {
        const P at = next[one.group - s * step]++;
        to_sources[at] = one.source;
        to_members[at] = static_cast<int64_t>(one.members);
      }
    }
  });
  return {indices, offsets, sources, members};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan(const Tensors& lists) {
  std::vector<int64_t> starts{0};  // where each list begins among all entries
  bool narrow = true;
  for (size_t k = 0; k < lists.size(); ++k) {
    check_indices_content("fuse_plan", {"indices", static_cast<int64_t>(k)}, lists[k], kNoLimit);
    starts.push_back(starts.back() + lists[k].numel());
    narrow &= lists[k].scalar_type() == ScalarType::Int;
  }
  const ScalarType index = narrow ? ScalarType::Int : ScalarType::Long;
  const ScalarType offset = starts.back() <= INT32_MAX ? ScalarType::Int : ScalarType::Long;
  return with_index(index, [&](auto i) {
    return with_index(offset, [&](auto o) {
      return make_plan<typename decltype(i)::type, typename decltype(o)::type>(lists, starts, index, offset);
    });
  });
}

// ---- fuse_ ---------------------------------------------------------------------------------------------

// Whether good(begin, end) holds for all of [0, n).
template <typename F>
bool all_of(int64_t n, const F& good) {
  if (n <= 4 * kGrain) return good(0, n);
  std::atomic<bool> all{true};
  torch::stable::parallel_for(0, n, 4 * kGrain, [&](int64_t begin, int64_t end) {
    if (!good(begin, end)) all.store(false, std::memory_order_relaxed);
  });
  return all.load();
}

void plan_content(int64_t granules, const FusePlan& plan, const Tensors& values, int64_t granule) {
  const int64_t n = plan.offsets.numel(), total = plan.sources.numel();
  const int64_t *const sources = plan.sources.const_data_ptr<int64_t>(), *const members =
                                                                             plan.members.const_data_ptr<int64_t>();
  with_index(plan.offsets.scalar_type(), [&](auto type) {
    using O = typename decltype(type)::type;
    const O* p = plan.offsets.const_data_ptr<O>();
    const bool rises = p[0] == 0 && p[n - 1] == total && all_of(n - 1, [=](int64_t begin, int64_t end) {
                         return !vector_any<O>(end - begin, [q = p + begin](int64_t i) { return q[i] > q[i + 1]; });
                       });
    if (!rises) refuse_offsets(p, n, total);
    if (n > 1) check_last_members(members, p[n - 2], p[n - 1], granules);
  });
  const int64_t adapters = static_cast<int64_t>(values.size());
  std::vector<int64_t> sizes;
  sizes.reserve(values.size());
  for (const Tensor& own : values) sizes.push_back(own.numel() / granule);
  const int64_t* const of = sizes.data();
  // What fits the smallest adapter fits all, and vectors can check that. Where it does not, one source after the other
  // is faster than lanes that look up a table.
  const int64_t smallest = *std::min_element(sizes.begin(), sizes.end());
  constexpr int64_t kSources = 512;  // stay in L1 for the second check
  const bool fit = all_of(total, [=](int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end; from += kSources) {
      const int64_t *const part = sources + from, *const own = members + from;
      const int64_t n = std::min(kSources, end - from);
      if (!vector_any<int64_t>(n, [=](int64_t i) { return !source_fits(part[i], own[i], smallest, adapters); }))
        continue;
      for (int64_t i = 0; i < n; ++i)
        if (!source_fits(part[i], own[i], of, adapters)) return false;
    }
    return true;
  });
  if (!fit) refuse_sources(sources, members, total, of, adapters);
}

constexpr int64_t kBlock = 512;  // entries of granules whose buffers stay in L1 together
// The adapters of one call, with a table for each property: an entry looks up only what its loop reads.
template <typename W, typename V>
struct Adapters {
  std::vector<const typename V::Bits*> values;
  const typename W::Compute* alphas;
  std::vector<core::Rule> rules;

  Adapters(const Tensors& tensors, const Tensor& strengths, const std::vector<bool>& delta)
      : alphas(static_cast<const typename W::Compute*>(strengths.const_data_ptr())) {
    for (size_t k = 0; k < tensors.size(); ++k) {
      values.push_back(static_cast<const typename V::Bits*>(tensors[k].const_data_ptr()));
      rules.push_back(core::rule_of(alphas[k], delta[k]));
    }
  }
};

struct FuseTask {
  void (*chunk)(const FuseTask&, int64_t begin, int64_t end);
  char* weight;
  char* saved;
  const void *indices, *offsets, *adapters;
  const int64_t *sources, *members;
  bool refuse;
  int64_t granule;
  int64_t total;
};

// Single entries, a group at a time: its sums stay in L1 while each source adds its values, which lie side by side.
template <typename W, typename V, typename I, typename O>
void fuse_entries(const FuseTask& task, int64_t begin, int64_t end) {
  using WB = typename W::Bits;
  using VB = typename V::Bits;
  using C = typename W::Compute;
  const auto& adapters = *static_cast<const Adapters<W, V>*>(task.adapters);
  WB* const weight = reinterpret_cast<WB*>(task.weight);
  const I* const all = static_cast<const I*>(task.indices);
  const O* const offsets = static_cast<const O*>(task.offsets);
  C bases[core::kGroup], sums[core::kGroup];
  WB mixed[core::kGroup], exact[core::kGroup];  // exact: what an overwrite at strength 1 stores, if it is alone
  int64_t next = begin;                         // whose line is fetched next
  const bool like_read = fetches_like_reads();
  const auto fetch = [&](int64_t stop) SHIRA_INLINE_LAMBDA {
    if (next < stop) prefetch_write(weight + all[next++], like_read);
  };
  while (next < std::min(end, begin + kAhead)) fetch(end);
  for (int64_t from = begin; from < end;) {
    const int64_t group = from / core::kGroup, start = group * core::kGroup;
    const int64_t first = from - start, last = std::min(end - start, core::kGroup);  // a chunk may begin or end inside
    const uint64_t inside = (~uint64_t{0} << first) & (~uint64_t{0} >> (core::kGroup - last));
    const int64_t stop = std::min(end, start + last + kAhead);
    const I* const indices = all + start;
    WB* const base = reinterpret_cast<WB*>(task.saved) + start;
    if (!task.refuse)
      for (int64_t i = first; i < last; ++i) base[i] = weight[indices[i]];
    vector_loop(last - first,
                [=, &bases, &sums](int64_t i) { bases[first + i] = sums[first + i] = W::load(base[first + i]); });
    uint64_t any = 0, several = 0, overwritten = 0;  // by adapters with a strength
    for (O at = offsets[group]; at < offsets[group + 1]; ++at) {
      const int64_t source = task.sources[at], k = core::adapter_of(source);
      const core::Rule rule = adapters.rules[k];
      const uint64_t all_members = static_cast<uint64_t>(task.members[at]), members = all_members & inside;
      if (rule == core::Rule::Keep) continue;
      const VB* const values =
          adapters.values[k] + core::position_of(source) + (first == 0 ? 0 : core::members_before(all_members, first));
      const VB* value = values;
      const C alpha = adapters.alphas[k];
      // Lines are fetched between the sums: the processor can wait for few at a time.
      if (rule == core::Rule::Delta)
        each_member(members, [&](int i) SHIRA_INLINE_LAMBDA {
          sums[i] = core::add_wide<C>(sums[i], bases[i], static_cast<C>(V::load(*value++)), alpha, true);
          fetch(stop);
        });
      else
        each_member(members, [&](int i) SHIRA_INLINE_LAMBDA {
          sums[i] = core::add_wide<C>(sums[i], bases[i], static_cast<C>(V::load(*value++)), alpha, false);
          fetch(stop);
        });
      if (rule == core::Rule::Overwrite) {
        value = values;
        each_member(members, [&](int i) SHIRA_INLINE_LAMBDA { exact[i] = core::convert<W, V>(*value++); });
        overwritten |= members;
      }
      several |= any & members;
      any |= members;
    }
    while (next < stop) fetch(stop);
    vector_loop(last - first, [=, &sums, &mixed](int64_t i) { mixed[first + i] = W::store(sums[first + i]); });
    each_member(inside & ~any, [&](int i) SHIRA_INLINE_LAMBDA { mixed[i] = base[i]; });
    each_member(overwritten & ~several, [&](int i) SHIRA_INLINE_LAMBDA { mixed[i] = exact[i]; });
    for (int64_t i = first; i < last; ++i) weight[indices[i]] = mixed[i];
    from = start + last;
  }
}

// A group's granules: whether any adapter with a strength changes one, and whether several do; for a single adapter,
// which one it is and its values there. Most granules have one, which is then found without a look at the group's other
// sources.
template <typename V>
struct Group {
  int64_t number = -1;
  uint64_t any, several;
  int64_t adapters[core::kGroup];
  const typename V::Bits* values[core::kGroup];

  template <typename W, typename O>
  void read(const FuseTask& task, int64_t group) {
    const auto& all = *static_cast<const Adapters<W, V>*>(task.adapters);
    const O* const offsets = static_cast<const O*>(task.offsets);
    number = group;
    any = several = 0;
    for (O at = offsets[group]; at < offsets[group + 1]; ++at) {
      const int64_t source = task.sources[at], k = core::adapter_of(source);
      if (all.rules[k] == core::Rule::Keep) continue;
      const uint64_t members = static_cast<uint64_t>(task.members[at]);
      const typename V::Bits* own = all.values[k] + core::position_of(source) * task.granule;
      each_member(members, [&](int i) SHIRA_INLINE_LAMBDA {
        adapters[i] = k;
        values[i] = own;
        own += task.granule;
      });
      several |= any & members;
      any |= members;
    }
  }
};

// A run within one granule, `skip` entries after its first: the same adapters for all of it.
template <typename W, typename V, typename O>
void fuse_run(const FuseTask& task, const Group<V>& group, int64_t number, int64_t skip, int64_t n,
              const typename W::Bits* base, typename W::Bits* mixed) {
  using C = typename W::Compute;
  const auto& adapters = *static_cast<const Adapters<W, V>*>(task.adapters);
  const int64_t place = number % core::kGroup;
  if (!core::is_member(group.any, place)) {
    std::copy_n(base, n, mixed);
    return;
  }
  if (!core::is_member(group.several, place)) {
    const int64_t k = group.adapters[place];
    vector_loop(n, [=, values = group.values[place] + skip, alpha = adapters.alphas[k], rule = adapters.rules[k]](
                       int64_t i) { mixed[i] = core::mix_by<W, V>(rule, base[i], values[i], alpha); });
    return;
  }
  C total[kBlock];
  vector_loop(n, [=, &total](int64_t i) { total[i] = W::load(base[i]); });
  const O* const offsets = static_cast<const O*>(task.offsets);
  for (O at = offsets[group.number]; at < offsets[group.number + 1]; ++at) {
    const uint64_t members = static_cast<uint64_t>(task.members[at]);
    const int64_t source = task.sources[at], k = core::adapter_of(source);
    if (!core::is_member(members, place) || adapters.rules[k] == core::Rule::Keep) continue;
    const int64_t position = core::position_of(source) + core::members_before(members, place);
    vector_loop(n, [=, &total, values = adapters.values[k] + position * task.granule + skip, alpha = adapters.alphas[k],
                    delta = adapters.rules[k] == core::Rule::Delta](int64_t i) {
      total[i] = core::add_share<W, V>(total[i], base[i], values[i], alpha, delta);
    });
  }
  vector_loop(n, [=, &total](int64_t i) { mixed[i] = W::store(total[i]); });
}

template <typename W, typename V, typename I, typename O>
void fuse_granules(const FuseTask& task, int64_t begin, int64_t end) {
  using WB = typename W::Bits;
  constexpr int64_t kBytes = sizeof(WB);
  const I* const indices = static_cast<const I*>(task.indices);
  const int64_t granule = task.granule;
  char* const weight = task.weight;
  WB mixed[kBlock];
  Group<V> group;
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = std::min(end, from + kBlock);
    WB* const base = reinterpret_cast<WB*>(task.saved) + from;
    if (!task.refuse)
      walk<kBytes, Fetch::Write>(weight, indices, granule, from, to, task.total, from == begin,
                                 [=](int64_t offset, int64_t at, int64_t length) {
                                   memcpy(base + (at - from), weight + offset, length * kBytes);
                                 });
    for (int64_t at = from; at < to;) {
      const int64_t number = at / granule, skip = at % granule, length = std::min(granule - skip, to - at);
      if (number / core::kGroup != group.number) group.template read<W, O>(task, number / core::kGroup);
      fuse_run<W, V, O>(task, group, number, skip, length, base + (at - from), mixed + (at - from));
      at += length;
    }
    walk<kBytes, Fetch::None>(weight, indices, granule, from, to, task.total, false,
                              [=, &mixed](int64_t offset, int64_t at, int64_t length) {
                                memcpy(weight + offset, mixed + (at - from), length * kBytes);
                              });
  }
}

void fuse(const Tensor& weight, const Tensor& saved, const Tensor& indices, const FusePlan& plan, const Tensors& values,
          const Tensor& alphas, const std::vector<bool>& delta, bool refuse, int64_t granule) {
  FuseTask task{};
  task.weight = static_cast<char*>(weight.data_ptr());
  task.saved = static_cast<char*>(saved.data_ptr());
  task.indices = indices.const_data_ptr();
  task.offsets = plan.offsets.const_data_ptr();
  task.sources = plan.sources.const_data_ptr<int64_t>();
  task.members = plan.members.const_data_ptr<int64_t>();
  task.refuse = refuse;
  task.granule = granule;
  task.total = indices.numel() * granule;
  with_dtypes(weight.scalar_type(), values[0].scalar_type(), [&](auto w, auto v) {
    using W = typename decltype(w)::type;
    using V = typename decltype(v)::type;
    const Adapters<W, V> adapters(values, alphas, delta);
    task.adapters = &adapters;
    with_index(indices.scalar_type(), [&](auto i) {
      with_index(plan.offsets.scalar_type(), [&](auto o) {
        using I = typename decltype(i)::type;
        using O = typename decltype(o)::type;
        task.chunk = granule == 1 ? fuse_entries<W, V, I, O> : fuse_granules<W, V, I, O>;
      });
    });
    run(task);
  });
}

struct Cpu {
  static void content(const char* op, Name name, const Tensor& indices, int64_t limit) {
    check_indices_content(op, name, indices, limit);
  }
  static constexpr auto plan_content = cpu::plan_content;
  static constexpr auto plan = cpu::plan;
  static constexpr auto fuse = cpu::fuse;
};

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (!shira::backend_is_reference()) shira::FuseOps<shira::cpu::Cpu>::implement(m);
}
