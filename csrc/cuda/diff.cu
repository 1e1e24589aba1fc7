// The diff family on CUDA: tiles count the granules that differ, a scan tells each tile where its output begins, the
// host reads the sizes, and tiles write what they found and refresh their part of the snapshot.
//
// Both passes read both tensors, so the op takes about twice the time of reading them. Granules whose size divides 16
// bytes are read 16 bytes at a time, several per load; others are compared in the widest units that their size and both
// addresses allow, by one thread per granule or, for large ones, by one block.
#include "../ops/diff.h"
#include "../ops/select.h"
#include "block.h"
#include "scan.h"

namespace shira::cuda {
namespace {

constexpr int kItems = 4;
constexpr int64_t kWideGranule = 1024;  // granules of at least this many bytes get a block each

struct DiffRow {
  void* snapshot;
  const void* weight;
  int64_t granules;
  int64_t units;     // per granule; per line, where a line holds several granules
  uint64_t* counts;  // differing granules in each tile; after the scan, before it
  void *indices, *values;
  bool wide;    // whether indices are int64
  bool before;  // whether the values are the snapshot's
};

__device__ __forceinline__ void put_index(const DiffRow& row, uint64_t place, int64_t index) {
  if (row.wide)
    store_stream(static_cast<int64_t*>(row.indices) + place, index);
  else
    store_stream(static_cast<int32_t*>(row.indices) + place, static_cast<int32_t>(index));
}

// Lines of 16 bytes with 16 / kBytes granules each; a thread has kItems lines of a tile, kThreads apart.
template <int kBytes>
struct Lines {
  static constexpr int kGranules = 16 / kBytes, kTile = kThreads * kItems * kGranules;
  using Line = Pack<Unit<kBytes>, kGranules>;

  static __device__ __forceinline__ bool differ(const Unit<kBytes>& a, const Unit<kBytes>& b) {
    if constexpr (kBytes == 16)
      return a.x != b.x || a.y != b.y
#if !defined(SHIRA_EMULATE)
             || a.z != b.z || a.w != b.w
#endif
          ;
    else
      return a != b;
  }
  // One bit per granule of a line, set if it differs. The last line may be partial: its granules are read one by one.
  static __device__ __forceinline__ uint32_t read(const DiffRow& row, int64_t line, Line& now) {
    uint32_t bits = 0;
    const int64_t first = line * kGranules;
    if (first >= row.granules) return 0;
    if (first + kGranules <= row.granules) {
      const Line old = Line::stream(row.snapshot, line);
      now = Line::stream(row.weight, line);
#pragma unroll
      for (int g = 0; g < kGranules; ++g) bits |= uint32_t{differ(old.entry[g], now.entry[g])} << g;
      return bits;
    }
#pragma unroll
    for (int g = 0; g < kGranules; ++g) {
      if (first + g >= row.granules) continue;
      const auto old = load_stream(static_cast<const Unit<kBytes>*>(row.snapshot) + first + g);
      now.entry[g] = load_stream(static_cast<const Unit<kBytes>*>(row.weight) + first + g);
      bits |= uint32_t{differ(old, now.entry[g])} << g;
    }
    return bits;
  }
  static __device__ __forceinline__ int64_t line(int64_t tile, int k) {
    return (tile * kItems + k) * kThreads + static_cast<int64_t>(threadIdx.x);
  }
};

template <int kBytes>
struct CountLines {
  using Row = DiffRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return (row.granules + Lines<kBytes>::kTile - 1) / Lines<kBytes>::kTile; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    uint64_t count = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      typename Lines<kBytes>::Line now;
      count += static_cast<uint64_t>(__popc(Lines<kBytes>::read(row, Lines<kBytes>::line(tile, k), now)));
    }
    count = block_sum(count);
    if (threadIdx.x == 0) store_stream(row.counts + tile, count);
  }
};

template <int kBytes>
struct WriteLines {
  using Row = DiffRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return CountLines<kBytes>::tiles(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    using L = Lines<kBytes>;
    uint64_t before = load_stream(row.counts + tile);
    for (int k = 0; k < kItems; ++k) {
      typename L::Line now;
      const int64_t line = L::line(tile, k);
      uint32_t bits = L::read(row, line, now);
      uint64_t total, place = before + block_scan(static_cast<uint64_t>(__popc(bits)), total, Plain{});
      before += total;
#pragma unroll
      for (int g = 0; g < L::kGranules; ++g) {
        if ((bits >> g & 1) == 0) continue;
        const int64_t granule = line * L::kGranules + g;
        put_index(row, place, granule);
        auto* const snapshot = static_cast<Unit<kBytes>*>(row.snapshot) + granule;
        store_stream(static_cast<Unit<kBytes>*>(row.values) + place,
                     row.before ? load_stream<Unit<kBytes>>(snapshot) : now.entry[g]);
        store_weight(snapshot, now.entry[g]);
        ++place;
      }
    }
  }
};

// Granules of several units: one per thread, and as many per tile as a block has threads. A large granule is a tile of
// its own, and the block's threads share its units.
template <int kUnit, bool kByBlock>
struct Granules {
  static constexpr int kTile = kByBlock ? 1 : kThreads;
  static __device__ __forceinline__ int64_t first() { return kByBlock ? static_cast<int64_t>(threadIdx.x) : 0; }
  static constexpr int64_t kStep = kByBlock ? kThreads : 1;

  // Whether this thread's part of a granule differs.
  static __device__ __forceinline__ bool differs(const DiffRow& row, int64_t granule) {
    if (granule >= row.granules) return false;
    for (int64_t unit = first(); unit < row.units; unit += kStep) {
      const int64_t at = granule * row.units + unit;
      const auto old = load_stream(static_cast<const Unit<kUnit>*>(row.snapshot) + at);
      const auto now = load_stream(static_cast<const Unit<kUnit>*>(row.weight) + at);
      if (Lines<kUnit>::differ(old, now)) return true;
    }
    return false;
  }
  static __device__ __forceinline__ int64_t granule(int64_t tile) {
    return tile * kTile + (kByBlock ? 0 : static_cast<int64_t>(threadIdx.x));
  }
  static __device__ __forceinline__ void write(const DiffRow& row, int64_t granule, uint64_t place) {
    if (first() == 0) put_index(row, place, granule);
    for (int64_t unit = first(); unit < row.units; unit += kStep) {
      const auto now = load_stream(static_cast<const Unit<kUnit>*>(row.weight) + granule * row.units + unit);
      auto* const snapshot = static_cast<Unit<kUnit>*>(row.snapshot) + granule * row.units + unit;
      store_stream(static_cast<Unit<kUnit>*>(row.values) + static_cast<int64_t>(place) * row.units + unit,
                   row.before ? load_stream<Unit<kUnit>>(snapshot) : now);
      store_weight(snapshot, now);
    }
  }
};

template <int kUnit, bool kByBlock>
struct CountGranules {
  using Row = DiffRow;
  using G = Granules<kUnit, kByBlock>;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return (row.granules + G::kTile - 1) / G::kTile; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    uint64_t count = block_sum(static_cast<uint64_t>(G::differs(row, G::granule(tile))));
    if (threadIdx.x == 0) store_stream(row.counts + tile, kByBlock ? uint64_t{count > 0} : count);
  }
};

template <int kUnit, bool kByBlock>
struct WriteGranules {
  using Row = DiffRow;
  using G = Granules<kUnit, kByBlock>;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return CountGranules<kUnit, kByBlock>::tiles(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    const uint64_t before = load_stream(row.counts + tile);
    if constexpr (kByBlock) {
      // The scan left the count before each tile: this tile's granule differs if the next count is higher.
      if (load_stream(row.counts + tile + 1) > before) G::write(row, tile, before);
    } else {
      const bool own = G::differs(row, G::granule(tile));
      uint64_t total;
      const uint64_t place = before + block_scan(own, total, Plain{});
      if (own) G::write(row, G::granule(tile), place);
    }
  }
};

// Puts the totals of the scans side by side, so that the host reads them at once.
struct TotalRow {
  const uint64_t* from;
  uint64_t* to;
};
struct Total {
  using Row = TotalRow;
  struct Scalars {};
  static int64_t tiles(const Row&) { return 1; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    if (threadIdx.x == 0) store_stream(row.to, load_stream(row.from));
  }
};

struct Launches {
  using Start = void (*)(const std::vector<DiffRow>&, cudaStream_t);
  int64_t (*tiles)(const DiffRow&);
  Start count, write;
};
template <typename Work>
void start(const std::vector<DiffRow>& rows, cudaStream_t stream) {
  launch_list<Work>({}, rows, stream);
}
template <typename Count, typename Write>
Launches launches() {
  return {Count::tiles, start<Count>, start<Write>};
}
// Chooses the kernels for granules of `bytes` bytes in memory of this alignment, and sets `units`.
Launches choose(int64_t bytes, int64_t aligned, int64_t& units) {
  units = 1;
  if (aligned == 16 && 16 % bytes == 0) {
    switch (bytes) {
      case 1: return launches<CountLines<1>, WriteLines<1>>();
      case 2: return launches<CountLines<2>, WriteLines<2>>();
      case 4: return launches<CountLines<4>, WriteLines<4>>();
      case 8: return launches<CountLines<8>, WriteLines<8>>();
      default: return launches<CountLines<16>, WriteLines<16>>();
    }
  }
  return with_unit(std::min(aligned, bytes & -bytes), [&](auto unit) {
    units = bytes / unit;
    return bytes >= kWideGranule ? launches<CountGranules<unit, true>, WriteGranules<unit, true>>()
                                 : launches<CountGranules<unit, false>, WriteGranules<unit, false>>();
  });
}

struct Cuda {
  static std::tuple<Tensors, Tensors> diff(const char*, const Tensors& snapshots, const Tensors& weights,
                                           int64_t granule, bool before) {
    if (weights.empty()) return {};
    const Device device(weights[0]);
    const size_t n = weights.size();
    std::vector<DiffRow> rows;
    std::vector<Launches> ways;
    std::vector<int64_t> tiles, places{0};
    for (size_t t = 0; t < n; ++t) {
      const int64_t bytes = granule * static_cast<int64_t>(weights[t].element_size());
      DiffRow row{address<void>(snapshots[t]),
                  address<const void>(weights[t]),
                  weights[t].numel() / granule,
                  1,
                  nullptr,
                  nullptr,
                  nullptr,
                  index_type(weights[t].numel() / granule) == ScalarType::Long,
                  before};
      ways.push_back(choose(bytes, widest_unit(16, row.snapshot, row.weight), row.units));
      tiles.push_back(ways[t].tiles(row));
      places.push_back(places[t] + tiles[t] + 1);
      rows.push_back(row);
    }
    const Tensor room = torch::stable::new_empty(weights[0], {places[n] + static_cast<int64_t>(n)}, ScalarType::Long);
    auto* const counts = address<uint64_t>(room);
    auto* const totals = counts + places[n];
    std::vector<ScanRow> scans;
    std::vector<TotalRow> ends;
    Groups<DiffRow, Launches::Start> counting;
    for (size_t t = 0; t < n; ++t) {
      rows[t].counts = counts + places[t];
      scans.push_back({rows[t].counts, tiles[t]});
      ends.push_back({rows[t].counts + tiles[t], totals + t});
      counting.add(ways[t].count, rows[t]);
    }
    counting.launch(device.stream);
    launch_list<Scan>({}, scans, device.stream);
    launch_list<Total>({}, ends, device.stream);
    std::vector<int64_t> sizes(n);
    fetch(sizes.data(), totals, static_cast<int64_t>(n * sizeof(int64_t)), device.stream);

    Tensors indices, values;
    Groups<DiffRow, Launches::Start> writing;
    for (size_t t = 0; t < n; ++t) {
      indices.push_back(torch::stable::new_empty(weights[t], {sizes[t]}, index_type(rows[t].granules)));
      values.push_back(torch::stable::new_empty(weights[t], {sizes[t] * granule}));
      rows[t].indices = address<void>(indices[t]);
      rows[t].values = address<void>(values[t]);
    }
    for (size_t t = 0; t < n; ++t)
      if (sizes[t] > 0) writing.add(ways[t].write, rows[t]);
    writing.launch(device.stream);
    return {indices, values};
  }
};

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::DiffOps<shira::cuda::Cuda>::implement(m);
}
