// The fuse family on the CPU: fuse_plan merges the adapters' sorted lists, fuse_ walks the union.
#include "../core/fuse.h"

#include <algorithm>
#include <atomic>
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

// One share's part of the plan: the entries [from[k], to[k]) of each list k, which are the plan's `first` and following
// sources. Returns how many entries their union has.
template <typename Key, typename I, typename O>
int64_t plan_share(const Tensors& lists, const int64_t* from, const int64_t* to, int64_t lowest, int64_t first,
                   int64_t n, int64_t* sources, I* entries, O* ends) {
  const auto keys = room<Key>(n), spare = room<Key>(n);
  const auto own = room<int64_t>(n);  // sources, list after list
  std::vector<int64_t> runs;
  int64_t filled = 0;
  for (size_t k = 0; k < lists.size(); ++k) {
    if (from[k] == to[k]) continue;
    with_index(lists[k].scalar_type(), [&](auto type) {
      const auto* list = lists[k].const_data_ptr<typename decltype(type)::type>();
      for (int64_t at = from[k]; at < to[k]; ++at, ++filled) {
        keys[filled] = static_cast<Key>(list[at] - lowest) << kHalf<Key> | static_cast<Key>(filled);
        own[filled] = core::source_of(static_cast<int64_t>(k), at);
      }
    });
    runs.push_back(filled);
  }
  const Key* const merged = merge_all(keys.get(), spare.get(), runs);
  constexpr Key kBelow = ~Key{0} >> kHalf<Key>;
  int64_t u = -1;
  Key last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Key index = merged[i] >> kHalf<Key>;
    sources[i] = own[static_cast<int64_t>(merged[i] & kBelow)];
    u += i == 0 || index != last;
    last = index;
    entries[u] = static_cast<I>(lowest + static_cast<int64_t>(index));
    ends[u] = static_cast<O>(first + i + 1);
  }
  return u + 1;
}

// The plan in shares: ranges of indices, each of which takes its part of every list.
template <typename I, typename O>
std::tuple<Tensor, Tensor, Tensor> make_plan(const Tensors& lists, int64_t total, ScalarType index, ScalarType offset) {
  const int64_t adapters = static_cast<int64_t>(lists.size());
  const Tensor& longest = *std::max_element(lists.begin(), lists.end(),
                                            [](const Tensor& a, const Tensor& b) { return a.numel() < b.numel(); });
  // Not more bounds than entries, however many adapters there are.
  const int64_t shares = std::min(total / std::max(kShare, adapters) + 1, std::max<int64_t>(1, longest.numel()));
  std::vector<int64_t> bounds((shares + 1) * adapters);  // where each share begins in each list
  std::vector<int64_t> starts(shares + 1), unions(shares + 1);
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
        starts[s] += bound;
      });
    }

  Tensor sources = torch::stable::new_empty(lists[0], {total}, ScalarType::Long);
  int64_t* const out = sources.mutable_data_ptr<int64_t>();
  // As long as the sources: only the merge tells how many of them belong to one entry.
  const auto entries = room<I>(total);
  const auto ends = room<O>(total);
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
      const int64_t first = starts[s], n = starts[s + 1] - first;
      const bool narrow = highest - lowest <= UINT32_MAX && n <= UINT32_MAX;
      unions[s + 1] =
          (narrow ? plan_share<Narrow, I, O> : plan_share<Wide, I, O>)(lists, from, to, lowest, first, n, out + first,
                                                                       entries.get() + first, ends.get() + first);
    }
  });
  for (int64_t s = 0; s < shares; ++s) unions[s + 1] += unions[s];

  Tensor indices = torch::stable::new_empty(lists[0], {unions[shares]}, index);
  Tensor offsets = torch::stable::new_empty(lists[0], {unions[shares] + 1}, offset);
  I* const to = indices.mutable_data_ptr<I>();
  O* const cuts = offsets.mutable_data_ptr<O>();
  cuts[0] = 0;
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t n = unions[s + 1] - unions[s];
      std::copy_n(entries.get() + starts[s], n, to + unions[s]);
      std::copy_n(ends.get() + starts[s], n, cuts + unions[s] + 1);
    }
  });
  return {indices, offsets, sources};
}

std::tuple<Tensor, Tensor, Tensor> plan(const Tensors& lists) {
  int64_t total = 0;
  bool narrow = true;
  for (size_t k = 0; k < lists.size(); ++k) {
    check_indices_content("fuse_plan", {"indices", static_cast<int64_t>(k)}, lists[k], kNoLimit);
    total += lists[k].numel();
    narrow &= lists[k].scalar_type() == ScalarType::Int;
  }
  const ScalarType index = narrow ? ScalarType::Int : ScalarType::Long;
  const ScalarType offset = total <= INT32_MAX ? ScalarType::Int : ScalarType::Long;
  return with_index(index, [&](auto i) {
    return with_index(offset, [&](auto o) {
      return make_plan<typename decltype(i)::type, typename decltype(o)::type>(lists, total, index, offset);
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

void plan_content(const Tensor& offsets, const Tensor& sources, const Tensors& values, int64_t granule) {
  const int64_t n = offsets.numel(), total = sources.numel();
  with_index(offsets.scalar_type(), [&](auto type) {
    using O = typename decltype(type)::type;
    const O* p = offsets.const_data_ptr<O>();
    const bool rises = p[0] == 0 && p[n - 1] == total && all_of(n - 1, [=](int64_t begin, int64_t end) {
                         return !vector_any<O>(end - begin, [q = p + begin](int64_t i) { return q[i] > q[i + 1]; });
                       });
    if (!rises) refuse_offsets(p, n, total);
  });
  const int64_t adapters = static_cast<int64_t>(values.size());
  std::vector<int64_t> sizes;
  sizes.reserve(values.size());
  for (const Tensor& own : values) sizes.push_back(own.numel() / granule);
  const int64_t *p = sources.const_data_ptr<int64_t>(), *of = sizes.data();
  // What fits the smallest adapter fits all, and vectors can check that. Where it does not, one source after the other
  // is faster than lanes that look up a table.
  const int64_t smallest = *std::min_element(sizes.begin(), sizes.end());
  constexpr int64_t kSources = 512;  // stay in L1 for the second check
  const bool fit = all_of(total, [=](int64_t begin, int64_t end) {
    for (int64_t from = begin; from < end; from += kSources) {
      const int64_t* const part = p + from;
      const int64_t n = std::min(kSources, end - from);
      if (!vector_any<int64_t>(n, [=](int64_t i) { return !source_fits(part[i], smallest, adapters); })) continue;
      for (int64_t i = 0; i < n; ++i)
        if (!source_fits(part[i], of, adapters)) return false;
    }
    return true;
  });
  if (!fit) refuse_sources(p, total, of, adapters);
}

constexpr int64_t kBlock = 512;  // entries of granules whose buffers stay in L1 together
// Single entries that are gathered, mixed and scattered together: each line is written soon after it was read. Measured
// on a Zen 5: 48 to 96 were fastest, 128 a tenth slower.
constexpr int64_t kEntries = 64;

// base -> mixed for n entries of one source each. `rules` is read where the adapters do not share one.
template <typename W, typename V>
using Mix = void (*)(int64_t n, const typename W::Bits* base, const typename V::Bits* values,
                     const typename W::Compute* alphas, const core::Rule* rules, typename W::Bits* mixed);

template <typename W, typename V, core::Rule rule>
void mix_alike(int64_t n, const typename W::Bits* base, const typename V::Bits* values,
               const typename W::Compute* alphas, const core::Rule*, typename W::Bits* mixed) {
  vector_loop(n, [=](int64_t i) { mixed[i] = core::mix<W, V, rule>(base[i], values[i], alphas[i]); });
}
template <typename W, typename V>
void mix_each(int64_t n, const typename W::Bits* base, const typename V::Bits* values,
              const typename W::Compute* alphas, const core::Rule* rules, typename W::Bits* mixed) {
  vector_loop(n, [=](int64_t i) { mixed[i] = core::mix_by<W, V>(rules[i], base[i], values[i], alphas[i]); });
}

// The adapters of one call, with a table for each property: an entry looks up only what the loop of its block reads.
template <typename W, typename V>
struct Adapters {
  std::vector<const typename V::Bits*> values;
  const typename W::Compute* alphas;
  std::vector<core::Rule> rules;
  bool alike;  // one rule for all
  Mix<W, V> mix;

  Adapters(const Tensors& tensors, const Tensor& strengths, const std::vector<bool>& delta)
      : alphas(static_cast<const typename W::Compute*>(strengths.const_data_ptr())) {
    for (size_t k = 0; k < tensors.size(); ++k) {
      values.push_back(static_cast<const typename V::Bits*>(tensors[k].const_data_ptr()));
      rules.push_back(core::rule_of(alphas[k], delta[k]));
    }
    alike = std::adjacent_find(rules.begin(), rules.end(), std::not_equal_to<>()) == rules.end();
    mix = mix_each<W, V>;
    if (alike) with_rule(rules[0], [&](auto rule) { mix = mix_alike<W, V, decltype(rule)::value>; });
  }
};

struct FuseTask {
  void (*chunk)(const FuseTask&, int64_t begin, int64_t end);
  char* weight;
  char* saved;
  const void *indices, *offsets, *adapters;
  const int64_t* sources;
  bool refuse;
  int64_t granule;
  int64_t total;
};

// Single entries. Most have one source: its value and strength are gathered for a whole block, which is then mixed in
// one vector loop. The few others are summed one by one.
template <typename W, typename V, typename I, typename O>
void fuse_entries(const FuseTask& task, int64_t begin, int64_t end) {
  using WB = typename W::Bits;
  using VB = typename V::Bits;
  using C = typename W::Compute;
  const auto& adapters = *static_cast<const Adapters<W, V>*>(task.adapters);
  const VB* const* const own = adapters.values.data();
  const C* const strengths = adapters.alphas;
  const bool alike = adapters.alike;
  const int64_t* const sources = task.sources;
  WB* const weight = reinterpret_cast<WB*>(task.weight);
  WB mixed[kEntries];
  VB values[kEntries];
  C alphas[kEntries];
  core::Rule rules[kEntries];
  int32_t others[kEntries];
  const auto fetch = [=, indices = static_cast<const I*>(task.indices)](int64_t i) {
    prefetch_write(weight + indices[i]);
  };
  for (int64_t i = begin; i < std::min(end, begin + kAhead); ++i) fetch(i);
  for (int64_t from = begin; from < end; from += kEntries) {
    const int64_t n = std::min(kEntries, end - from);
    const I* const indices = static_cast<const I*>(task.indices) + from;
    const O* const offsets = static_cast<const O*>(task.offsets) + from;
    WB* const base = reinterpret_cast<WB*>(task.saved) + from;
    int64_t count = 0;
    O first = offsets[0];
    for (int64_t i = 0; i < n; ++i) {
      if (from + i + kAhead < end) fetch(from + i + kAhead);
      if (!task.refuse) base[i] = weight[indices[i]];
      const O next = offsets[i + 1];
      if (next - first == 1) {
        const int64_t source = sources[first], k = core::adapter_of(source);
        values[i] = own[k][core::position_of(source)];
        alphas[i] = strengths[k];
        if (!alike) rules[i] = adapters.rules[k];
      } else {
        values[i] = 0;
        alphas[i] = 0;
        rules[i] = core::Rule::Keep;
        others[count++] = static_cast<int32_t>(i);
      }
      first = next;
    }
    adapters.mix(n, base, values, alphas, rules, mixed);
    for (int64_t o = 0; o < count; ++o) {
      const int32_t i = others[o];
      core::FusedEntries<W, V> entry(base + i);
      for (O at = offsets[i]; at < offsets[i + 1]; ++at) {
        const int64_t source = sources[at], k = core::adapter_of(source);
        entry.add(adapters.rules[k], own[k] + core::position_of(source), strengths[k]);
      }
      entry.result(mixed + i);
    }
    for (int64_t i = 0; i < n; ++i) weight[indices[i]] = mixed[i];
  }
}

// A run within one granule, `skip` entries after its first: the same sources for all of it.
template <typename W, typename V, typename O>
void fuse_run(const FuseTask& task, int64_t number, int64_t skip, int64_t n, const typename W::Bits* base,
              typename W::Bits* mixed) {
  using VB = typename V::Bits;
  using C = typename W::Compute;
  const auto& adapters = *static_cast<const Adapters<W, V>*>(task.adapters);
  const O* const offsets = static_cast<const O*>(task.offsets);
  C total[kBlock];
  int64_t first = 0, count = 0;  // the first adapter that counts, and how many do
  const VB* first_values = nullptr;
  const auto add = [&](int64_t k, const VB* values) {
    vector_loop(n, [=, &total, alpha = adapters.alphas[k], delta = adapters.rules[k] == core::Rule::Delta](int64_t i) {
      total[i] = core::add_share<W, V>(total[i], base[i], values[i], alpha, delta);
    });
  };
  for (O at = offsets[number]; at < offsets[number + 1]; ++at) {
    const int64_t source = task.sources[at], k = core::adapter_of(source);
    if (adapters.rules[k] == core::Rule::Keep) continue;
    const VB* values = adapters.values[k] + core::position_of(source) * task.granule + skip;
    if (count++ == 0) {
      first = k;
      first_values = values;
      continue;
    }
    if (count == 2) {
      vector_loop(n, [=, &total](int64_t i) { total[i] = W::load(base[i]); });
      add(first, first_values);
    }
    add(k, values);
  }
  if (count == 0)
    std::copy_n(base, n, mixed);
  else if (count == 1)
    vector_loop(n, [=, alpha = adapters.alphas[first], rule = adapters.rules[first]](int64_t i) {
      mixed[i] = core::mix_by<W, V>(rule, base[i], first_values[i], alpha);
    });
  else
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
      fuse_run<W, V, O>(task, number, skip, length, base + (at - from), mixed + (at - from));
      at += length;
    }
    walk<kBytes, Fetch::None>(weight, indices, granule, from, to, task.total, false,
                              [=, &mixed](int64_t offset, int64_t at, int64_t length) {
                                memcpy(weight + offset, mixed + (at - from), length * kBytes);
                              });
  }
}

void fuse(const Tensor& weight, const Tensor& saved, const Tensor& indices, const Tensor& offsets,
          const Tensor& sources, const Tensors& values, const Tensor& alphas, const std::vector<bool>& delta,
          bool refuse, int64_t granule) {
  FuseTask task{};
  task.weight = static_cast<char*>(weight.data_ptr());
  task.saved = static_cast<char*>(saved.data_ptr());
  task.indices = indices.const_data_ptr();
  task.offsets = offsets.const_data_ptr();
  task.sources = sources.const_data_ptr<int64_t>();
  task.refuse = refuse;
  task.granule = granule;
  task.total = indices.numel() * granule;
  with_dtypes(weight.scalar_type(), values[0].scalar_type(), [&](auto w, auto v) {
    using W = typename decltype(w)::type;
    using V = typename decltype(v)::type;
    const Adapters<W, V> adapters(values, alphas, delta);
    task.adapters = &adapters;
    with_index(indices.scalar_type(), [&](auto i) {
      with_index(offsets.scalar_type(), [&](auto o) {
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
