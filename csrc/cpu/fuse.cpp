// The fuse family on the CPU: fuse_plan merges the adapters' sorted lists, fuse_ walks the union.
#include "../core/fuse.h"

#include <atomic>
#include <memory>

#include "../fuse_ops.h"
#include "../dispatch.h"
#include "vector.h"
#include "walk.h"

namespace shira::cpu {
namespace {

// ---- fuse_plan -----------------------------------------------------------------------------------------

constexpr int64_t kShare = 8192;  // entries that are merged at a time: the two buffers of a share stay in L2

struct Item {
  int64_t index, source;
};

// Merges two runs; of equal indices the left run's comes first.
inline void merge(const Item* left, const Item* middle, const Item* end, Item* out) {
  const Item* right = middle;
  while (left < middle && right < end) {
    const bool from_right = right->index < left->index;
    *out++ = *(from_right ? right : left);
    right += from_right;
    left += !from_right;
  }
  out = std::copy(left, middle, out);
  std::copy(right, end, out);
}

// Merges the runs that end at `ends`, neighbours with neighbours, until there is one: the runs' order is kept.
inline const Item* merge_all(Item* items, Item* spare, std::vector<int64_t>& ends) {
  while (ends.size() > 1) {
    size_t kept = 0;
    int64_t begin = 0;
    for (size_t r = 0; r < ends.size(); r += 2) {
      const size_t last = std::min(r + 1, ends.size() - 1);
      merge(items + begin, items + ends[r], items + ends[last], spare + begin);
      begin = ends[kept++] = ends[last];
    }
    ends.resize(kept);
    std::swap(items, spare);
  }
  return items;
}

template <typename T>
std::unique_ptr<T[]> room(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
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
  // As long as the sources: how many of them belong to one entry is known when they are merged.
  const auto entries = room<I>(total);
  const auto ends = room<O>(total);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    int64_t most = 0;
    for (int64_t s = begin; s < end; ++s) most = std::max(most, starts[s + 1] - starts[s]);
    const auto items = room<Item>(most), spare = room<Item>(most);
    std::vector<int64_t> runs;
    for (int64_t s = begin; s < end; ++s) {
      runs.clear();
      Item* item = items.get();
      for (int64_t k = 0; k < adapters; ++k) {
        const int64_t from = bounds[s * adapters + k], to = bounds[(s + 1) * adapters + k];
        if (from == to) continue;
        with_index(lists[k].scalar_type(), [&](auto type) {
          const auto* list = lists[k].const_data_ptr<typename decltype(type)::type>();
          for (int64_t at = from; at < to; ++at) *item++ = {list[at], core::source_of(k, at)};
        });
        runs.push_back(item - items.get());
      }
      const Item* merged = merge_all(items.get(), spare.get(), runs);
      const int64_t first = starts[s], n = starts[s + 1] - first;
      int64_t u = first - 1, last = -1;
      for (int64_t i = 0; i < n; ++i) {
        out[first + i] = merged[i].source;
        u += merged[i].index != last;
        last = merged[i].index;
        entries[u] = static_cast<I>(last);
        ends[u] = static_cast<O>(first + i + 1);
      }
      unions[s + 1] = u + 1 - first;
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
  // One by one: a table read by a vector's lanes is slower.
  const bool fit = all_of(total, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!source_fits(p[i], of, adapters)) return false;
    return true;
  });
  if (!fit) refuse_sources(p, total, of, adapters);
}

constexpr int64_t kStreamAhead = 2048;  // bytes: sources are read in order, and the hardware stops at a page's end
constexpr int64_t kBlock = 512;         // entries whose buffers stay in L1 together

// How an adapter's values count in one call.
template <typename C>
struct Strength {
  C alpha;
  core::Rule rule;
};
template <typename V, typename C>
struct Adapter {
  const typename V::Bits* values;
  Strength<C> strength;
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

// Single entries. Most have one source: its value and strength are picked up for a whole block, which is then mixed
// in one vector loop. The others, few, are summed one by one.
template <typename W, typename V, typename O>
void fuse_entries(const FuseTask& task, int64_t from, int64_t n, const typename W::Bits* base,
                  typename W::Bits* mixed) {
  using VB = typename V::Bits;
  using C = typename W::Compute;
  const auto* const adapters = static_cast<const Adapter<V, C>*>(task.adapters);
  const O* const offsets = static_cast<const O*>(task.offsets) + from;
  VB values[kBlock];
  Strength<C> strengths[kBlock];
  int32_t others[kBlock];
  int64_t count = 0;
  O begin = offsets[0];
  for (int64_t i = 0; i < n; ++i) {
    const O end = offsets[i + 1];
    if (begin % 8 == 0) prefetch_read(reinterpret_cast<const char*>(task.sources + begin) + kStreamAhead);
    if (end - begin == 1) {
      const int64_t source = task.sources[begin];
      const Adapter<V, C>& adapter = adapters[core::adapter_of(source)];
      values[i] = adapter.values[core::position_of(source)];
      strengths[i] = adapter.strength;
    } else {
      values[i] = 0;
      strengths[i] = {0, core::Rule::Keep};
      others[count++] = static_cast<int32_t>(i);
    }
    begin = end;
  }
  vector_loop(n, [=, &values, &strengths](int64_t i) {
    mixed[i] = core::mix_by<W, V>(strengths[i].rule, base[i], values[i], strengths[i].alpha);
  });
  for (int64_t k = 0; k < count; ++k) {
    const int32_t i = others[k];
    core::FusedEntry<W, V> entry(base[i]);
    for (O at = offsets[i]; at < offsets[i + 1]; ++at) {
      const int64_t source = task.sources[at];
      const Adapter<V, C>& adapter = adapters[core::adapter_of(source)];
      entry.add(adapter.strength.rule, adapter.values[core::position_of(source)], adapter.strength.alpha);
    }
    mixed[i] = entry.result();
  }
}

// A run within one granule, `skip` entries after its first: the same sources for all of it.
template <typename W, typename V, typename O>
void fuse_run(const FuseTask& task, int64_t number, int64_t skip, int64_t n, const typename W::Bits* base,
              typename W::Bits* mixed) {
  using VB = typename V::Bits;
  using C = typename W::Compute;
  const auto* const adapters = static_cast<const Adapter<V, C>*>(task.adapters);
  const O* const offsets = static_cast<const O*>(task.offsets);
  C total[kBlock];
  const Adapter<V, C>* first = nullptr;
  const VB* first_values = nullptr;
  int64_t count = 0;
  const auto add = [&](const Adapter<V, C>& adapter, const VB* values) {
    vector_loop(n, [=, &total, alpha = adapter.strength.alpha, delta = adapter.strength.rule == core::Rule::Delta](
                       int64_t i) { total[i] = core::add_share<W, V>(total[i], base[i], values[i], alpha, delta); });
  };
  for (O at = offsets[number]; at < offsets[number + 1]; ++at) {
    const int64_t source = task.sources[at];
    const Adapter<V, C>& adapter = adapters[core::adapter_of(source)];
    if (adapter.strength.rule == core::Rule::Keep) continue;
    const VB* values = adapter.values + core::position_of(source) * task.granule + skip;
    if (count++ == 0) {
      first = &adapter;
      first_values = values;
      continue;
    }
    if (count == 2) {
      vector_loop(n, [=, &total](int64_t i) { total[i] = W::load(base[i]); });
      add(*first, first_values);
    }
    add(adapter, values);
  }
  if (count == 0)
    std::copy_n(base, n, mixed);
  else if (count == 1)
    vector_loop(n, [=, alpha = first->strength.alpha, rule = first->strength.rule](int64_t i) {
      mixed[i] = core::mix_by<W, V>(rule, base[i], first_values[i], alpha);
    });
  else
    vector_loop(n, [=, &total](int64_t i) { mixed[i] = W::store(total[i]); });
}

template <typename W, typename V, typename I, typename O>
void fuse_chunk(const FuseTask& task, int64_t begin, int64_t end) {
  using WB = typename W::Bits;
  constexpr int64_t kBytes = sizeof(WB);
  const I* const indices = static_cast<const I*>(task.indices);
  const int64_t granule = task.granule;
  WB mixed[kBlock];
  // Of single entries the next block's lines are fetched while this one is mixed, which takes as long.
  const auto fetch = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) prefetch_write(task.weight + int64_t{indices[i]} * kBytes);
  };
  const int64_t block = granule == 1 ? kAhead : kBlock;
  if (granule == 1) fetch(begin, std::min(end, begin + block));
  for (int64_t from = begin; from < end; from += block) {
    const int64_t to = std::min(end, from + block);
    WB* const base = reinterpret_cast<WB*>(task.saved) + from;
    const auto keep = [&](int64_t offset, int64_t at, int64_t length) {
      memcpy(base + (at - from), task.weight + offset, length * kBytes);
    };
    if (granule == 1) fetch(to, std::min(end, to + block));
    if (!task.refuse && granule == 1)
      walk<kBytes, Fetch::None>(task.weight, indices, granule, from, to, task.total, false, keep);
    else if (!task.refuse)
      walk<kBytes, Fetch::Write>(task.weight, indices, granule, from, to, task.total, from == begin, keep);
    if (granule == 1) {
      fuse_entries<W, V, O>(task, from, to - from, base, mixed);
    } else {
      for (int64_t at = from; at < to;) {
        const int64_t number = at / granule, skip = at % granule, length = std::min(granule - skip, to - at);
        fuse_run<W, V, O>(task, number, skip, length, base + (at - from), mixed + (at - from));
        at += length;
      }
    }
    walk<kBytes, Fetch::None>(task.weight, indices, granule, from, to, task.total, false,
                              [&](int64_t offset, int64_t at, int64_t length) {
                                memcpy(task.weight + offset, mixed + (at - from), length * kBytes);
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
    using C = typename W::Compute;
    std::vector<Adapter<V, C>> adapters;
    adapters.reserve(values.size());
    for (size_t k = 0; k < values.size(); ++k) {
      const C alpha = static_cast<const C*>(alphas.const_data_ptr())[k];
      adapters.push_back(
          {static_cast<const typename V::Bits*>(values[k].const_data_ptr()), alpha, core::rule_of(alpha, delta[k])});
    }
    task.adapters = adapters.data();
    with_index(indices.scalar_type(), [&](auto i) {
      with_index(offsets.scalar_type(), [&](auto o) {
        task.chunk = fuse_chunk<W, V, typename decltype(i)::type, typename decltype(o)::type>;
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

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) {
  if (!shira::backend_is_reference()) shira::FuseOps<shira::cpu::Cpu>::implement(m);
}
