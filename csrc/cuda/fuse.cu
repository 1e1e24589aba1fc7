// The fuse family on CUDA: fuse_plan ranks the adapters' entries against one another, fuse_ walks the union.
#include "../core/fuse.h"

#include "../dispatch.h"
#include "../ops/fuse.h"
#include "block.h"
#include "indices.h"
#include "scan.h"

namespace shira::cuda {
namespace {

constexpr int kItems = 4;
constexpr int kTile = kThreads * kItems;

// ---- fuse_plan -----------------------------------------------------------------------------------------
//
// The lists are sorted, so an entry's place in the merged list is the sum of its places in each list: there is nothing
// to sort. The union is the first one of each entry, compacted. A group's sources are then found by searching each list
// for the group's bounds.

struct PlanRow {
  const Indices* lists;
  const int64_t* starts;  // where each list begins among all entries, then their number
  int32_t adapters;
  int64_t total;
  // In the order of the merged lists:
  int64_t* entries;
  uint8_t* firsts;  // whether this is the first of those that are equal
};

__device__ __forceinline__ Indices list_of(const Indices* lists, int64_t k) {
  Indices result;
  result.data = reinterpret_cast<const void*>(load_cached(reinterpret_cast<const uint64_t*>(&lists[k].data)));
  result.count = load_cached(&lists[k].count);
  result.wide = load_cached(reinterpret_cast<const uint8_t*>(&lists[k].wide)) != 0;
  return result;
}

// At most `most` of a list's indices, from `begin` on.
__device__ __forceinline__ Indices part_of(const Indices& list, int64_t begin, int64_t most) {
  const int64_t left = list.count - begin;
  return {static_cast<const char*>(list.data) + begin * (list.wide ? 8 : 4), left < most ? left : most, list.wide};
}

// How many of a list's indices are below x, or (`or_equal`) not above it.
__device__ __forceinline__ int64_t count_below(const Indices& list, int64_t x, bool or_equal) {
  int64_t low = 0, count = list.count;
  while (count > 0) {
    const int64_t half = count / 2, index = list.cached(low + half);
    if (index < x || (or_equal && index == x)) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

struct Rank {
  using Row = PlanRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return (row.total + kThreads - 1) / kThreads; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    const int64_t at = tile * kThreads + threadIdx.x;
    if (at >= row.total) return;
    int32_t own = 0;
    for (int32_t end = row.adapters; end - own > 1;) {
      const int32_t middle = (own + end) / 2;
      if (load_cached(row.starts + middle) <= at)
        own = middle;
      else
        end = middle;
    }
    const int64_t position = at - load_cached(row.starts + own), x = list_of(row.lists, own).cached(position);
    int64_t rank = position;
    bool first = true;
    for (int32_t k = 0; k < row.adapters; ++k) {
      if (k == own) continue;
      const Indices other = list_of(row.lists, k);
      const int64_t below = count_below(other, x, k < own);
      rank += below;
      if (k < own && below > 0 && other.cached(below - 1) == x) first = false;
    }
    store_stream(row.entries + rank, x);
    store_stream(row.firsts + rank, static_cast<uint8_t>(first));
  }
};

struct UnionRow {
  const uint8_t* firsts;
  const int64_t* entries;
  int64_t total;
  uint64_t* counts;  // firsts in each tile; after the scan, before it
  void* indices;
  bool wide;
};

// Number `at` of a list whose width is known at run time.
__device__ __forceinline__ void put_index(void* list, bool wide, uint64_t at, int64_t x) {
  if (wide)
    store_stream(static_cast<int64_t*>(list) + at, x);
  else
    store_stream(static_cast<int32_t*>(list) + at, static_cast<int32_t>(x));
}

struct CountFirsts {
  using Row = UnionRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return (row.total + kTile - 1) / kTile; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    uint64_t count = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t at = tile * kTile + k * kThreads + threadIdx.x;
      if (at < row.total) count += load_stream(row.firsts + at);
    }
    count = block_sum(count);
    if (threadIdx.x == 0) store_stream(row.counts + tile, count);
  }
};

struct WriteUnion {
  using Row = UnionRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return CountFirsts::tiles(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    uint64_t place = load_stream(row.counts + tile);
    for (int k = 0; k < kItems; ++k) {
      const int64_t at = tile * kTile + k * kThreads + threadIdx.x;
      const bool first = at < row.total && load_stream(row.firsts + at) != 0;
      uint64_t total;
      const uint64_t before = place + block_scan(first, total, Plain{});
      place += total;
      if (first) put_index(row.indices, row.wide, before, load_stream(row.entries + at));
    }
  }
};

struct SourcesRow {
  const Indices* lists;
  int64_t adapters;
  Indices united;
  uint64_t* counts;  // sources in each tile; after the scan, before it
  void* offsets;
  bool wide;  // the offsets
  int64_t *sources, *members;

  SHIRA_HD int64_t pairs() const { return core::groups_of(united.count) * adapters; }
};

// The granules of one list in one group of the union. Pairs of them are numbered group by group, list by list.
struct Pair {
  int64_t group, adapter, begin;
  Indices granules;  // of the list
  Indices entries;   // of the group

  __device__ __forceinline__ Pair(const SourcesRow& row, int64_t number)
      : group(number / row.adapters), adapter(number % row.adapters) {
    const Indices list = list_of(row.lists, adapter);
    entries = part_of(row.united, group * core::kGroup, core::kGroup);
    begin = count_below(list, entries.cached(0), false);
    granules = part_of(list, begin, core::kGroup);
    granules.count = count_below(granules, entries.cached(entries.count - 1), true);
  }
};

struct CountSources {
  using Row = SourcesRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return (row.pairs() + kTile - 1) / kTile; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    uint64_t count = 0;
    for (int k = 0; k < kItems; ++k) {
      const int64_t at = tile * kTile + k * kThreads + threadIdx.x;
      if (at < row.pairs()) count += Pair(row, at).granules.count > 0;
    }
    count = block_sum(count);
    if (threadIdx.x == 0) store_stream(row.counts + tile, count);
  }
};

struct WriteSources {
  using Row = SourcesRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return CountSources::tiles(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    uint64_t place = load_stream(row.counts + tile);
    for (int k = 0; k < kItems; ++k) {
      const int64_t at = tile * kTile + k * kThreads + threadIdx.x, last = row.pairs() - 1;
      const Pair pair(row, at < last ? at : last);
      const bool given = at <= last && pair.granules.count > 0;
      uint64_t total;
      const uint64_t before = place + block_scan(given, total, Plain{});
      place += total;
      if (at <= last && pair.adapter == 0) put_index(row.offsets, row.wide, pair.group, static_cast<int64_t>(before));
      if (at == last) put_index(row.offsets, row.wide, pair.group + 1, static_cast<int64_t>(before + given));
      if (!given) continue;
      uint64_t members = 0;
      for (int64_t i = 0; i < pair.granules.count; ++i)
        members |= uint64_t{1} << count_below(pair.entries, pair.granules.cached(i), false);
      store_stream(row.sources + before, core::source_of(pair.adapter, pair.begin));
      store_stream(row.members + before, static_cast<int64_t>(members));
    }
  }
};

// ---- fuse_ ---------------------------------------------------------------------------------------------

struct Adapter {
  const void* values;
  int64_t granules;
  bool delta;
};

static_assert(sizeof(Adapter) % 8 == 0);
constexpr int kFew = 64;  // this many adapters travel with the launch; more are put into a table on the device first

// The table's lines are kernel parameters too, not a copy from the host, so that a captured graph holds them.
struct PutRow {
  Adapter* table;
  Adapter few[kFew];
  int32_t count;
};

struct Put {
  using Row = PutRow;
  struct Scalars {};
  static int64_t tiles(const Row&) { return 1; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= row.count) return;
    Adapter* const own = row.table + thread;
    store_stream(reinterpret_cast<uint64_t*>(&own->values), reinterpret_cast<uint64_t>(row.few[thread].values));
    store_stream(&own->granules, row.few[thread].granules);
    store_stream(reinterpret_cast<uint8_t*>(&own->delta), static_cast<uint8_t>(row.few[thread].delta));
  }
};

struct FuseRow {
  void* weight;
  void* saved;
  Indices indices, offsets;
  const int64_t *sources, *members;
  int64_t total;  // number of sources
  const void* alphas;
  const Adapter* many;  // on the device, if there are more than kFew
  Adapter few[kFew];
  int64_t adapters;
  int64_t limit;
  Granule granule;  // in units of kEntries entries
  bool refuse;
  int32_t tile;  // units per block

  SHIRA_HD int64_t units() const { return indices.count * granule.units; }
};

// A unit is kEntries neighbouring entries of a granule: they have the same sources.
template <typename W, typename V, int kEntries>
struct Fuse {
  using Row = FuseRow;
  struct Scalars {};
  using C = typename W::Compute;
  // Without a bound, ptxas spills the odd register of fp64 sums to fit a third block.
  static constexpr int kLeastBlocks = sizeof(C) == 8 ? 2 : 0;
  using Base = Pack<typename W::Bits, kEntries>;
  using Value = Pack<typename V::Bits, kEntries>;

  static int64_t tiles(const Row& row) { return (row.units() + row.tile - 1) / row.tile; }

  // What a thread needs to know about an adapter. A few are kept in shared memory: neighbours ask for different ones.
  struct Strength {
    const void* values;
    int64_t granules;
    C alpha;
    core::Rule rule;
  };
  static __device__ __forceinline__ Strength strength(const Row& row, int64_t k) {
    const C alpha = load_cached(static_cast<const C*>(row.alphas) + k);
    if (row.many == nullptr)
      return {row.few[k].values, row.few[k].granules, alpha, core::rule_of(alpha, row.few[k].delta)};
    const Adapter* own = row.many + k;
    const auto values = load_cached(reinterpret_cast<const uint64_t*>(&own->values));
    const bool delta = load_cached(reinterpret_cast<const uint8_t*>(&own->delta)) != 0;
    return {reinterpret_cast<const void*>(values), load_cached(&own->granules), alpha, core::rule_of(alpha, delta)};
  }

  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    SHIRA_SHARED(few, kFew, Strength);
    if (row.many == nullptr) {
      if (threadIdx.x < row.adapters) few[threadIdx.x] = strength(row, threadIdx.x);
      __syncthreads();
    }
    const int64_t total = row.units(), begin = tile * row.tile, stop = begin + row.tile;
    // For all units of a thread, the indices are in flight together, then the bases and first members. A warp's units
    // lie in two groups or fewer, so that it walks the same sources and finds them in L1.
    const Items<kItems> items(row.indices, row.granule, begin, stop < total ? stop : total);
    int64_t group[kItems], next[kItems], to[kItems], at[kItems], end[kItems];  // `to` below 0: nothing to do
    uint64_t members[kItems];
    Base base[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      group[k] = static_cast<int64_t>(static_cast<uint64_t>(items.number[k]) / core::kGroup);
      next[k] = group[k] + 1;
    }
    row.offsets.all(group, at);
    row.offsets.all(next, end);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      // The plan's content may be unchecked: what does not fit is skipped.
      if (at[k] < 0) at[k] = 0;
      if (end[k] > row.total) end[k] = row.total;
      const bool inside = items.is(k) && within(items.index[k], row.limit);
      to[k] = inside ? items.index[k] * row.granule.units + items.offset[k] : -1;
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (to[k] < 0) continue;
      base[k] = row.refuse ? Base::stream(row.saved, items.at(k)) : Base::weight(row.weight, to[k]);
      if (at[k] < end[k]) members[k] = bits(row, at[k]);
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (to[k] < 0) continue;
      core::FusedEntries<W, V, kEntries> fused(base[k].entry);
      while (at[k] < end[k]) {
        const uint64_t now = members[k];
        const int64_t here = at[k]++;
        if (at[k] < end[k]) members[k] = bits(row, at[k]);
        if (!core::is_member(now, items.number[k])) continue;
        const int64_t source = load_cached(row.sources + here), adapter = core::adapter_of(source);
        const int64_t position = core::position_of(source) + core::members_before(now, items.number[k]);
        if (!within(adapter, row.adapters)) continue;
        const Strength own = row.many == nullptr ? few[adapter] : strength(row, adapter);
        if (position >= own.granules) continue;
        const Value value = Value::stream(own.values, position * row.granule.units + items.offset[k]);
        fused.add(own.rule, value.entry, own.alpha);
      }
      if (!row.refuse) base[k].to_stream(row.saved, items.at(k));
      fused.result(base[k].entry);
      base[k].to_weight(row.weight, to[k]);
    }
  }

 private:
  static __device__ __forceinline__ uint64_t bits(const Row& row, int64_t source) {
    return static_cast<uint64_t>(load_cached(row.members + source));
  }
};

struct Cuda {
  static void content(const char*, Name, const Tensor&, int64_t) {}               // each access is guarded instead
  static void plan_content(int64_t, const FusePlan&, const Tensors&, int64_t) {}  // likewise

  // A copy on the device, in memory that `room` owns.
  template <typename T>
  static const T* upload(const std::vector<T>& list, const Tensor& like, Tensor& room, cudaStream_t stream) {
    const int64_t bytes = static_cast<int64_t>(list.size() * sizeof(T));
    room = torch::stable::new_empty(like, {(bytes + 7) / 8}, ScalarType::Long);
    SHIRA_CUDA_CHECK(
        cudaMemcpyAsync(room.data_ptr(), list.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream));
    return address<const T>(room);
  }

  // Scans the counts of a launch's tiles. Returns their sum, after waiting for it.
  static int64_t scan(uint64_t* counts, int64_t tiles, cudaStream_t stream) {
    launch_one<Scan>({}, {counts, tiles}, stream);
    int64_t total;
    fetch(&total, counts + tiles, sizeof(total), stream);
    return total;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> plan(const Tensors& lists) {
    const Device device(lists[0]);
    std::vector<Indices> views;
    std::vector<int64_t> starts{0};
    bool narrow = true;
    for (size_t k = 0; k < lists.size(); ++k) {
      check_content("fuse_plan", {"indices", static_cast<int64_t>(k)}, lists[k], kNoLimit, device.stream);
      views.push_back(indices_of(lists[k]));
      starts.push_back(starts.back() + lists[k].numel());
      narrow &= lists[k].scalar_type() == ScalarType::Int;
    }
    const int64_t total = starts.back(), adapters = static_cast<int64_t>(lists.size());
    const ScalarType index = narrow ? ScalarType::Int : ScalarType::Long;
    const ScalarType offset = total <= INT32_MAX ? ScalarType::Int : ScalarType::Long;
    const auto room = [&](int64_t n, ScalarType type) { return torch::stable::new_empty(lists[0], {n}, type); };
    if (total == 0) {
      Tensor offsets = room(1, offset);
      SHIRA_CUDA_CHECK(cudaMemsetAsync(offsets.data_ptr(), 0, offsets.element_size(), device.stream));
      return {room(0, index), offsets, room(0, ScalarType::Long), room(0, ScalarType::Long)};
    }
    Tensor views_room = lists[0], starts_room = lists[0];
    const Indices* const on_device = upload(views, lists[0], views_room, device.stream);
    const Tensor entries = room(total, ScalarType::Long), firsts = room(total, ScalarType::Byte);
    const PlanRow ranks{on_device,
                        upload(starts, lists[0], starts_room, device.stream),
                        static_cast<int32_t>(adapters),
                        total,
                        address<int64_t>(entries),
                        address<uint8_t>(firsts)};
    launch_one<Rank>({}, ranks, device.stream);
    UnionRow row{address<const uint8_t>(firsts), address<const int64_t>(entries), total, nullptr, nullptr, !narrow};
    const int64_t tiles = CountFirsts::tiles(row);
    const Tensor counts = room(tiles + 1, ScalarType::Long);
    row.counts = address<uint64_t>(counts);
    launch_one<CountFirsts>({}, row, device.stream);
    Tensor indices = room(scan(row.counts, tiles, device.stream), index);
    row.indices = address<void>(indices);
    launch_one<WriteUnion>({}, row, device.stream);

    SourcesRow pairs{on_device, adapters, indices_of(indices), nullptr, nullptr, offset == ScalarType::Long,
                     nullptr,   nullptr};
    const int64_t parts = CountSources::tiles(pairs);
    const Tensor sums = room(parts + 1, ScalarType::Long);
    pairs.counts = address<uint64_t>(sums);
    launch_one<CountSources>({}, pairs, device.stream);
    const int64_t size = scan(pairs.counts, parts, device.stream);
    Tensor offsets = room(core::groups_of(indices.numel()) + 1, offset);
    Tensor sources = room(size, ScalarType::Long), members = room(size, ScalarType::Long);
    pairs.offsets = address<void>(offsets);
    pairs.sources = address<int64_t>(sources);
    pairs.members = address<int64_t>(members);
    launch_one<WriteSources>({}, pairs, device.stream);
    return {indices, offsets, sources, members};
  }

  // A table on the device, in memory that `room` owns.
  static const Adapter* put(const std::vector<Adapter>& adapters, const Tensor& like, Tensor& room,
                            cudaStream_t stream) {
    room =
        torch::stable::new_empty(like, {static_cast<int64_t>(adapters.size() * sizeof(Adapter) / 8)}, ScalarType::Long);
    auto* const table = address<Adapter>(room);
    std::vector<PutRow> rows;
    for (size_t begin = 0; begin < adapters.size(); begin += kFew) {
      PutRow row{table + begin, {}, static_cast<int32_t>(std::min<size_t>(kFew, adapters.size() - begin))};
      std::copy_n(adapters.begin() + static_cast<int64_t>(begin), row.count, row.few);
      rows.push_back(row);
    }
    launch_list<Put>({}, rows, stream);
    return table;
  }

  static void fuse(const Tensor& weight, const Tensor& saved, const Tensor& indices, const FusePlan& plan,
                   const Tensors& values, const Tensor& alphas, const std::vector<bool>& delta, bool refuse,
                   int64_t granule) {
    const Device device(weight);
    std::vector<Adapter> adapters;
    for (size_t k = 0; k < values.size(); ++k)
      adapters.push_back({address<const void>(values[k]), values[k].numel() / granule, static_cast<bool>(delta[k])});
    FuseRow row{address<void>(weight),
                refuse ? const_cast<void*>(address<const void>(saved)) : address<void>(saved),
                indices_of(indices),
                indices_of(plan.offsets),
                address<const int64_t>(plan.sources),
                address<const int64_t>(plan.members),
                plan.sources.numel(),
                address<const void>(alphas),
                nullptr,
                {},
                static_cast<int64_t>(adapters.size()),
                weight.numel() / granule,
                {},
                refuse,
                0};
    Tensor room = weight;
    if (adapters.size() <= kFew)
      std::copy(adapters.begin(), adapters.end(), row.few);
    else
      row.many = put(adapters, weight, room, device.stream);
    int64_t unit = widest_unit(granule * static_cast<int64_t>(weight.element_size()), row.weight, row.saved);
    for (const Adapter& adapter : adapters) unit = widest_unit(unit, adapter.values);
    with_dtypes(weight.scalar_type(), values[0].scalar_type(), [&](auto w, auto v) {
      using W = typename decltype(w)::type;
      using V = typename decltype(v)::type;
      constexpr int kBytes = sizeof(typename W::Bits), kWide = kBytes == 8 ? 1 : 16 / kBytes;
      const auto launch = [&](auto entries) {
        row.granule = Granule::of(granule / entries);
        row.tile = tile_of<kItems>(row.units());
        launch_one<Fuse<W, V, entries>>({}, row, device.stream);
      };
      if (unit == 16)
        launch(std::integral_constant<int, kWide>{});
      else
        launch(std::integral_constant<int, 1>{});
    });
  }
};

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::FuseOps<shira::cuda::Cuda>::implement(m);
}
