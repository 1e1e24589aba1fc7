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
// to sort, and the adapters of an entry stay in order. The union is the first source of each entry, compacted.

struct PlanRow {
  const Indices* lists;
  const int64_t* starts;  // where each list begins among all entries, then their number
  int32_t adapters;
  int64_t total;
  // In the order of the merged lists:
  int64_t* sources;
  int64_t* entries;
  uint8_t* firsts;  // whether this source is the first of its entry
};

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
    const int64_t position = at - load_cached(row.starts + own), x = list(row, own).cached(position);
    int64_t rank = position;
    bool first = true;
    for (int32_t k = 0; k < row.adapters; ++k) {
      if (k == own) continue;
      const Indices other = list(row, k);
      const int64_t below = count_below(other, x, k < own);
      rank += below;
      if (k < own && below > 0 && other.cached(below - 1) == x) first = false;
    }
    store_stream(row.sources + rank, core::source_of(own, position));
    store_stream(row.entries + rank, x);
    store_stream(row.firsts + rank, static_cast<uint8_t>(first));
  }

 private:
  static __device__ __forceinline__ Indices list(const Row& row, int32_t k) {
    Indices result;
    result.data = reinterpret_cast<const void*>(load_cached(reinterpret_cast<const uint64_t*>(&row.lists[k].data)));
    result.count = load_cached(&row.lists[k].count);
    result.wide = load_cached(reinterpret_cast<const uint8_t*>(&row.lists[k].wide)) != 0;
    return result;
  }
};

struct UnionRow {
  const uint8_t* firsts;
  const int64_t* entries;
  int64_t total;
  uint64_t* counts;  // firsts in each tile; after the scan, before it
  void *indices, *offsets;
  bool wide_indices, wide_offsets;
};

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
      if (first) {
        put(row.indices, row.wide_indices, before, load_stream(row.entries + at));
        put(row.offsets, row.wide_offsets, before, at);
      }
      if (at == row.total - 1) put(row.offsets, row.wide_offsets, before + first, row.total);
    }
  }

 private:
  static __device__ __forceinline__ void put(void* list, bool wide, uint64_t at, int64_t x) {
    if (wide)
      store_stream(static_cast<int64_t*>(list) + at, x);
    else
      store_stream(static_cast<int32_t*>(list) + at, static_cast<int32_t>(x));
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
  const int64_t* sources;
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
    // For all units of a thread, the indices are in flight together, then the bases and first sources. The sums then
    // wait for one source after the other, most often for one or none.
    const Items<kItems> items(row.indices, row.granule, begin, stop < total ? stop : total);
    int64_t next[kItems], to[kItems], at[kItems], end[kItems], source[kItems];  // `to` below 0: nothing to do
    Base base[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) next[k] = items.number[k] + 1;
    row.offsets.all(items.number, at);
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
      if (at[k] < end[k]) source[k] = load_cached(row.sources + at[k]);
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (to[k] < 0) continue;
      core::FusedEntries<W, V, kEntries> fused(base[k].entry);
      while (at[k] < end[k]) {
        const int64_t adapter = core::adapter_of(source[k]), position = core::position_of(source[k]);
        if (++at[k] < end[k]) source[k] = load_cached(row.sources + at[k]);
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
};

struct Cuda {
  static void content(const char*, Name, const Tensor&, int64_t) {}                   // each access is guarded instead
  static void plan_content(const Tensor&, const Tensor&, const Tensors&, int64_t) {}  // likewise

  // A copy on the device, in memory that `room` owns.
  template <typename T>
  static const T* upload(const std::vector<T>& list, const Tensor& like, Tensor& room, cudaStream_t stream) {
    const int64_t bytes = static_cast<int64_t>(list.size() * sizeof(T));
    room = torch::stable::new_empty(like, {(bytes + 7) / 8}, ScalarType::Long);
    SHIRA_CUDA_CHECK(
        cudaMemcpyAsync(room.data_ptr(), list.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream));
    return address<const T>(room);
  }

  static std::tuple<Tensor, Tensor, Tensor> plan(const Tensors& lists) {
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
    const int64_t total = starts.back();
    const ScalarType index = narrow ? ScalarType::Int : ScalarType::Long;
    const ScalarType offset = total <= INT32_MAX ? ScalarType::Int : ScalarType::Long;
    const auto room = [&](int64_t n, ScalarType type) { return torch::stable::new_empty(lists[0], {n}, type); };
    Tensor sources = room(total, ScalarType::Long);
    if (total == 0) {
      Tensor offsets = room(1, offset);
      SHIRA_CUDA_CHECK(cudaMemsetAsync(offsets.data_ptr(), 0, offsets.element_size(), device.stream));
      return {room(0, index), offsets, sources};
    }
    Tensor views_room = sources, starts_room = sources;
    const Tensor entries = room(total, ScalarType::Long), firsts = room(total, ScalarType::Byte);
    const PlanRow plan{upload(views, lists[0], views_room, device.stream),
                       upload(starts, lists[0], starts_room, device.stream),
                       static_cast<int32_t>(lists.size()),
                       total,
                       address<int64_t>(sources),
                       address<int64_t>(entries),
                       address<uint8_t>(firsts)};
    launch_one<Rank>({}, plan, device.stream);
    UnionRow row{
        address<const uint8_t>(firsts), address<const int64_t>(entries), total, nullptr, nullptr, nullptr, !narrow,
        offset == ScalarType::Long};
    const int64_t tiles = CountFirsts::tiles(row);
    const Tensor counts = room(tiles + 1, ScalarType::Long);
    row.counts = address<uint64_t>(counts);
    launch_one<CountFirsts>({}, row, device.stream);
    launch_one<Scan>({}, {row.counts, tiles}, device.stream);
    int64_t size;
    fetch(&size, row.counts + tiles, sizeof(size), device.stream);
    Tensor indices = room(size, index), offsets = room(size + 1, offset);
    row.indices = address<void>(indices);
    row.offsets = address<void>(offsets);
    launch_one<WriteUnion>({}, row, device.stream);
    return {indices, offsets, sources};
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

  static void fuse(const Tensor& weight, const Tensor& saved, const Tensor& indices, const Tensor& offsets,
                   const Tensor& sources, const Tensors& values, const Tensor& alphas, const std::vector<bool>& delta,
                   bool refuse, int64_t granule) {
    const Device device(weight);
    std::vector<Adapter> adapters;
    for (size_t k = 0; k < values.size(); ++k)
      adapters.push_back({address<const void>(values[k]), values[k].numel() / granule, static_cast<bool>(delta[k])});
    FuseRow row{address<void>(weight),
                refuse ? const_cast<void*>(address<const void>(saved)) : address<void>(saved),
                indices_of(indices),
                indices_of(offsets),
                address<const int64_t>(sources),
                sources.numel(),
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
