// The select family on CUDA.
//
// select_top: the exact top-k without a score tensor and without waiting for the host. The k-th highest key is found
// digit by digit, 11 bits at a time from the top: a pass over the weight counts the next digits of the keys that agree
// with the digits found so far, and one block picks the digit that holds the k-th. Once the cut is known, a last pass
// writes in order: a tile learns its offset from the tiles before it, which publish their counts as soon as they know
// them. This takes four passes for float32 scores. Each pass computes the scores again, except for granules of kLong
// entries or more: their keys take at most an eighth of the weight's memory, and are computed once.
//
// A score that is the magnitude of one 16-bit entry has 15 bits: all of them are one digit, whose counts fit in a
// block's shared memory, and so two passes are enough.
//
// select_random: the images of 0 .. k-1, sorted by torch.
#include "../ops/select.h"
#include "block.h"

namespace shira::cuda {
namespace {

using core::Score;

constexpr int kItems = 16;  // side by side, so that a thread loads 16 bytes at a time
constexpr int kTile = kThreads * kItems;
constexpr int64_t kLong = 16;
constexpr int kDigit = 11, kBins = 1 << kDigit;

// ---- select_top ------------------------------------------------------------------------------------------

constexpr int kBlocks = 1024, kMostRounds = 16;  // about as many blocks as the largest GPUs run at once

// All keys above `key` are selected, and the first `ties` of those equal to it.
struct Cut {
  int64_t key;  // during the search: the digits found so far
  int64_t ties;
};

struct SelectRow {
  const void *weight, *grad;
  int64_t granule, granules;
  Cut* cut;
  unsigned long long* histogram;  // [kBins], zeros before and after every digit; [kMagnitudes] of 16-bit entries
  unsigned long long* groups;     // [kGroups]: the sums of kGroup neighbours in the histogram of 16-bit entries
  uint64_t *above, *ties;         // what each tile has published; zeros at first
  uint32_t* next;                 // the next tile to take
  void* keys;                     // for granules of kLong entries or more
  const void* stored;             // what Stored makes keys of: those, or 16-bit entries
  void* out;
  int64_t k;
  int32_t shift, bins;  // the digit's lowest bit, and how many values it has
  int32_t rounds;       // tiles per counting block, which adds up its histogram once for all of them
  int32_t infinity;     // of 16-bit entries: greater magnitudes are NaN
  bool first, wide, aligned;
};

int64_t tile_count(const SelectRow& row) { return (row.granules + kTile - 1) / kTile; }

template <typename W, typename G, Score score>
struct Scores {
  using Key = core::Key<typename W::Compute>;
  using Weight = typename W::Bits;
  using Grad = typename G::Bits;

  static __device__ __forceinline__ void load(const void* weights, const void* grads, int64_t i, Weight& weight,
                                              Grad& grad) {
    if constexpr (score != Score::Grad) weight = load_cached(static_cast<const Weight*>(weights) + i);
    if constexpr (score != Score::Magnitude) grad = load_cached(static_cast<const Grad*>(grads) + i);
  }
  // f(e, key) for each of a thread's granules of a tile, which are neighbours; past the last one, the key is below 0.
  template <typename F>
  static __device__ __forceinline__ void each(const SelectRow& row, int64_t tile, const F& f) {
    const int64_t run = tile * kThreads + threadIdx.x, first = run * kItems;
    if (row.granule == 1 && row.aligned && (tile + 1) * kTile <= row.granules) {
      Pack<Weight, kItems> weight;
      Pack<Grad, kItems> grad;
      if constexpr (score != Score::Grad) weight = Pack<Weight, kItems>::cached(row.weight, run);
      if constexpr (score != Score::Magnitude) grad = Pack<Grad, kItems>::cached(row.grad, run);
#pragma unroll
      for (int e = 0; e < kItems; ++e)
        f(e, core::score_key(core::entry_score<W, G, score>(weight.entry, grad.entry, e)));
      return;
    }
    const int64_t rest = row.granules - first;
    const int left = rest < 0 ? 0 : rest < kItems ? static_cast<int>(rest) : kItems;
    int64_t i = first * row.granule;
#pragma unroll
    for (int e = 0; e < kItems; ++e) {
      typename W::Compute total = 0;
      const int64_t end = e < left ? i + row.granule : i;
#pragma unroll 1
      for (; i < end; ++i) {
        Weight weight = 0;
        Grad grad = 0;
        load(row.weight, row.grad, i, weight, grad);
        total += core::entry_score<W, G, score>(&weight, &grad, 0);  // in entry order
      }
      f(e, e < left ? core::score_key(total) : Key{-1});
    }
  }
};

// Keys that were computed before.
template <typename KeyOf>
struct Kept {
  using Key = KeyOf;
  using Entry = KeyOf;
  static __device__ __forceinline__ Key key(const SelectRow&, Entry entry) { return entry; }
};

// 16-bit entries whose magnitudes are the scores: keys below kMagnitudes, in the order of core::score_key.
struct Short {
  using Key = int32_t;
  using Entry = uint16_t;
  static __device__ __forceinline__ Key key(const SelectRow& row, Entry entry) {
    const int32_t magnitude = entry & 0x7FFF;
    return magnitude > row.infinity ? 0 : magnitude + 1;
  }
};

// Keys that take no arithmetic: there is one entry for each.
template <typename Of>
struct Stored {
  using Key = typename Of::Key;
  using Entry = typename Of::Entry;
  template <typename F>
  static __device__ __forceinline__ void each(const SelectRow& row, int64_t tile, const F& f) {
    const int64_t run = tile * kThreads + threadIdx.x;
    if (row.aligned && (tile + 1) * kTile <= row.granules) {
      const auto some = Pack<Entry, kItems>::cached(row.stored, run);
#pragma unroll
      for (int e = 0; e < kItems; ++e) f(e, Of::key(row, some.entry[e]));
      return;
    }
#pragma unroll
    for (int e = 0; e < kItems; ++e) {
      const int64_t at = run * kItems + e;
      f(e, at < row.granules ? Of::key(row, load_cached(static_cast<const Entry*>(row.stored) + at)) : Key{-1});
    }
  }
};

// Computes the keys of long granules. A sum is in entry order, so one thread makes it; but the whole block loads, in
// whole lines, for the lanes that add. kTeam warps load for the 32 granules of one of them: all warps, if granules are
// longer than what one warp loads of each at a time. kVector: 16 bytes per access.
template <typename W, typename G, Score score, int kTeam, bool kVector>
struct Sum {
  using Row = SelectRow;
  struct Scalars {};
  static constexpr int kLeastBlocks = 2;
  using C = typename W::Compute;
  using Weight = typename W::Bits;
  using Grad = typename G::Bits;
  static constexpr int kWeightBytes = score == Score::Grad ? 0 : sizeof(Weight);
  static constexpr int kGradBytes = score == Score::Magnitude ? 0 : sizeof(Grad);
  static constexpr int kWide = kVector ? 16 / std::max(kWeightBytes, kGradBytes) : 1;
  static constexpr int kColumns = 128 / sizeof(C), kPitch = kColumns + 1;  // no bank conflicts
  static constexpr int kPacks = kColumns / kWide;  // of a line; and of a lane, since there are as many lines as lanes
  // Packs that a lane has in flight. Where those are all of them, it loads the next ones while others are added.
  static constexpr int kAtOnce = std::min(kPacks, !kVector ? 4 : score == Score::Snip ? 2 : 8);
  static constexpr bool kAhead = kAtOnce == kPacks;
  static constexpr int kGranules = kThreads / kTeam;

  struct Loaded {
    Pack<Weight, kWide> weight[kAtOnce];
    Pack<Grad, kWide> grad[kAtOnce];
  };
  // f(k, line, column) for kAtOnce of a lane's packs.
  template <typename F>
  static __device__ __forceinline__ void each(int begin, const F& f) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = (begin + k) * 32 + lane;
      f(k, at / kPacks, at % kPacks * kWide);
    }
  }
  // What lies past the last line or column repeats it, so that no branch is between two loads; it is not added.
  static __device__ __forceinline__ void load(const Row& row, int64_t first, int64_t from, int begin, Loaded& loaded) {
    each(begin, [&](int k, int line, int column) {
      const int64_t granule = first + line < row.granules ? first + line : row.granules - 1;
      const int64_t last = row.granule - kWide, ahead = from + column;
      const int64_t at = (granule * row.granule + (ahead < last ? ahead : last)) / kWide;
      if constexpr (score != Score::Grad) loaded.weight[k] = Pack<Weight, kWide>::cached(row.weight, at);
      if constexpr (score != Score::Magnitude) loaded.grad[k] = Pack<Grad, kWide>::cached(row.grad, at);
    });
  }
  static __device__ __forceinline__ void keep(C* own, int begin, const Loaded& loaded) {
    each(begin, [&](int k, int line, int column) {
#pragma unroll
      for (int e = 0; e < kWide; ++e)
        own[line * kPitch + column + e] =
            core::entry_score<W, G, score>(loaded.weight[k].entry, loaded.grad[k].entry, e);
    });
  }

  static int64_t tiles(const Row& row) { return (row.granules + kGranules - 1) / kGranules; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    SHIRA_SHARED(terms, kWarps * 32 * kPitch, C);
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    C* const own = terms + warp * 32 * kPitch;
    const int64_t first = tile * kGranules + warp / kTeam * 32, step = kTeam * kColumns;
    C total = 0;
    int64_t from = warp % kTeam * kColumns;
    Loaded loaded;
    if constexpr (kAhead) load(row, first, from, 0, loaded);
    for (int64_t begin = 0; begin < row.granule; begin += step) {
      if constexpr (kAhead) {
        keep(own, 0, loaded);
      } else {
#pragma unroll 1
        for (int k = 0; k < kPacks; k += kAtOnce) {
          load(row, first, from, k, loaded);
          keep(own, k, loaded);
        }
      }
      __syncthreads();
      from += step;
      if constexpr (kAhead)
        if (begin + step < row.granule) load(row, first, from, 0, loaded);
      if (warp % kTeam == 0) {
        const int64_t rest = row.granule - begin;
        const int count = static_cast<int>(rest < step ? rest : step);
        for (int part = 0; part * kColumns < count; ++part)
#pragma unroll 8
          for (int column = 0; column < kColumns; ++column)
            if (part * kColumns + column < count) total += own[(part * 32 + lane) * kPitch + column];
      }
      __syncthreads();
    }
    if (warp % kTeam == 0 && first + lane < row.granules)
      store_stream(static_cast<core::Key<C>*>(row.keys) + first + lane, core::score_key(total));
  }
};

template <typename Keys>
struct Histogram {
  using Row = SelectRow;
  struct Scalars {};
  static constexpr int kLeastBlocks = 4;
  static int64_t tiles(const Row& row) { return (tile_count(row) + row.rounds - 1) / row.rounds; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    using Key = typename Keys::Key;
    using Bits = std::make_unsigned_t<Key>;
    SHIRA_SHARED(bins, kBins, uint32_t);
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    const Bits base = static_cast<Bits>(load_cached(&row.cut->key));
    for (int32_t round = 0; round < row.rounds; ++round)
      Keys::each(row, tile * row.rounds + round, [&](int, Key key) {
        // Keys below the base wrap around to large numbers.
        const Bits bin = static_cast<Bits>(static_cast<Bits>(key) - base) >> row.shift;
        if (key >= 0 && bin < static_cast<Bits>(row.bins)) atomicAdd(bins + bin, 1u);
      });
    __syncthreads();
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads)
      if (bins[bin] != 0) atomicAdd(row.histogram + bin, static_cast<unsigned long long>(bins[bin]));
  }
};

// Of kOwn * kThreads bins, the one that holds the `wanted`-th highest key, and which of the bin's keys that is. A block
// looks for it; each thread has kOwn neighbours of the bins, from the top. count(bin) is how many keys a bin holds.
struct Found {
  int64_t bin, rank;
};
template <int kOwn, typename Count>
__device__ __forceinline__ Found find(int64_t wanted, const Count& count) {
  SHIRA_SHARED(found, 1, Found);
  uint64_t counts[kOwn], sum = 0, total;
  if (threadIdx.x == 0) *found = {0, wanted};  // where the counts are too few, since the weight is being written to
  const int top = kOwn * (kThreads - static_cast<int>(threadIdx.x)) - 1;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) sum += counts[k] = count(top - k);
  uint64_t above = block_scan(sum, total, Plain{});
  const auto place = static_cast<uint64_t>(wanted);
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    if (above < place && place <= above + counts[k])  // true in one thread only
      *found = {top - k, static_cast<int64_t>(place - above)};
    above += counts[k];
  }
  __syncthreads();
  return *found;
}

// One block picks the next digit.
struct Pick {
  using Row = SelectRow;
  struct Scalars {};
  static int64_t tiles(const Row&) { return 1; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    const Cut cut{load_stream(&row.cut->key), row.first ? row.k : load_stream(&row.cut->ties)};
    const Found found = find<kBins / kThreads>(cut.ties, [&](int bin) {
      const unsigned long long count = load_stream(row.histogram + bin);
      store_stream(row.histogram + bin, 0ull);
      return count;
    });
    if (threadIdx.x == 0) {
      store_stream(&row.cut->key, cut.key + (found.bin << row.shift));
      store_stream(&row.cut->ties, found.rank);
    }
  }
};

// ---- the one digit of 16-bit entries

constexpr int kMagnitudes = 1 << 15, kGroup = 128, kGroups = kMagnitudes / kGroup;
static_assert(kGroups == kThreads && kGroup <= kThreads);
constexpr int kCounting = 1024;  // threads of a block: there is one on a multiprocessor, whose shared memory it takes
constexpr int kUnits = 3;        // of 16 bytes that a thread has in flight: 48 KB on a multiprocessor
constexpr int kChunk = 32 * kUnits;  // units that a warp takes at a time

// Adds what a block has counted to the histogram, and forgets it.
template <typename Counter>
__device__ __forceinline__ void add_up(const SelectRow& row, Counter* counts) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int group = warp; group < kGroups; group += kCounting / 32) {
    uint32_t sum = 0;
#pragma unroll
    for (int k = 0; k < kGroup; k += 32) {
      const int key = group * kGroup + k + lane;
      const int magnitude = (key + kMagnitudes - 1) % kMagnitudes;  // of key 0: one of NaN's
      const uint32_t count = counts[magnitude];
      if (count == 0) continue;
      counts[magnitude] = 0;
      if (magnitude <= row.infinity) {
        atomicAdd(row.histogram + key, static_cast<unsigned long long>(count));
        sum += count;
      } else {
        atomicAdd(row.histogram, static_cast<unsigned long long>(count));
        atomicAdd(row.groups, static_cast<unsigned long long>(count));
      }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    if (lane == 0 && sum != 0) atomicAdd(row.groups + group, static_cast<unsigned long long>(sum));
  }
}

__device__ __forceinline__ void count_one(uint32_t* counts, uint32_t magnitude) { atomicAdd(counts + magnitude, 1u); }
// Two counters share a word: a block cannot add to 16 bits.
__device__ __forceinline__ void count_one(uint16_t* counts, uint32_t magnitude) {
  atomicAdd(reinterpret_cast<uint32_t*>(counts) + magnitude / 2, magnitude % 2 == 0 ? 1u : 0x10000u);
}
template <typename Counter>
__device__ __forceinline__ void count_unit(Counter* counts, const Pack<uint32_t, 4>& unit) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    count_one(counts, unit.entry[e] & 0x7FFF);
    count_one(counts, unit.entry[e] >> 16 & 0x7FFF);
  }
}

// Counters of 32 bits never run over: no multiprocessor has that many entries to count. Those of 16 bits are added up
// before they can.
template <typename Counter>
__global__ void __launch_bounds__(kCounting, 1) count_magnitudes(SHIRA_PARAMETER(row, SelectRow)) {
  constexpr int64_t kRounds = sizeof(Counter) == 4 ? INT32_MAX : (UINT16_MAX - 16) / (kCounting * kUnits * 8);
  SHIRA_SHARED_REST(counts, Counter);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t block = blockIdx.x, blocks = gridDim.x, warps = blocks * (kCounting / 32);
  for (int i = thread; i < kMagnitudes; i += kCounting) counts[i] = 0;
  __syncthreads();

  // Units of 16 bytes, and the few entries before the first and after the last.
  const auto* const entries = static_cast<const uint16_t*>(row.stored);
  const auto misplaced = static_cast<int64_t>(reinterpret_cast<uintptr_t>(entries) % 16 / sizeof(uint16_t));
  const int64_t skipped = (8 - misplaced) % 8, head = skipped < row.granules ? skipped : row.granules;
  const int64_t units = (row.granules - head) / 8, tail = head + 8 * units;
  if (block == 0 && thread < 16) {
    const int64_t i = thread < 8 ? thread : tail + thread - 8;
    if (i < (thread < 8 ? head : row.granules)) count_one(counts, load_weight(entries + i) & 0x7FFF);
  }
  const int64_t chunks = (units + kChunk - 1) / kChunk;
  int64_t begin = 0;
  do {
    const int64_t end = chunks - begin < warps * kRounds ? chunks : begin + warps * kRounds;
    for (int64_t chunk = begin + warp * blocks + block; chunk < end; chunk += warps) {
      const int64_t first = chunk * kChunk + lane;
      if ((chunk + 1) * kChunk <= units) {
        Pack<uint32_t, 4> unit[kUnits];
#pragma unroll
        for (int k = 0; k < kUnits; ++k) unit[k] = Pack<uint32_t, 4>::weight(entries + head, first + k * 32);
#pragma unroll
        for (int k = 0; k < kUnits; ++k) count_unit(counts, unit[k]);
      } else {
        for (int64_t at = first; at < units; at += 32)
          count_unit(counts, Pack<uint32_t, 4>::weight(entries + head, at));
      }
    }
    __syncthreads();
    add_up(row, counts);
    __syncthreads();
    begin = end;
  } while (begin < chunks);
}

// One block picks the key: first the group of keys that holds it.
struct PickShort {
  using Row = SelectRow;
  struct Scalars {};
  static int64_t tiles(const Row&) { return 1; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    const Found group = find<1>(row.k, [&](int bin) { return load_stream(row.groups + bin); });
    const int64_t first = group.bin * kGroup;
    const Found found =
        find<1>(group.rank, [&](int bin) { return bin < kGroup ? load_stream(row.histogram + first + bin) : 0ull; });
    if (threadIdx.x == 0) {
      store_stream(&row.cut->key, first + found.bin);
      store_stream(&row.cut->ties, found.rank);
    }
  }
};

// ---- the selection itself

// Two counts below 2^32, packed into one sum.
__device__ __forceinline__ uint64_t both(uint32_t above, uint32_t ties) { return uint64_t{above} << 32 | ties; }

// What a tile publishes: nothing yet (0), its own counts, or those of itself and all tiles before it.
constexpr uint64_t kHas = uint64_t{1} << 62, kUpTo = uint64_t{2} << 62, kSaid = kHas - 1;

// The counts of all tiles before this one, above the cut and at it. Called by a whole warp: it looks at 32 tiles at a
// time, back to one that knows what is before it. Tiles are taken in order, so those it waits for are running.
__device__ __forceinline__ void look_back(const SelectRow& row, int64_t tile, uint64_t own_above, uint64_t own_ties,
                                          uint64_t& above, uint64_t& ties) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  above = ties = 0;
  if (lane == 0) {
    store_volatile(row.above + tile, kHas | own_above);
    store_volatile(row.ties + tile, kHas | own_ties);
  }
  for (int64_t end = tile; end > 0; end -= 32) {
    const int64_t at = end - 1 - lane;
    uint64_t a = kUpTo, t = kUpTo;  // there is nothing before the first tile
    if (at >= 0) do {
        a = load_volatile(row.above + at);
        t = load_volatile(row.ties + at);
      } while (a <= kSaid || a >> 62 != t >> 62);  // the two are published one after the other
    const uint32_t up_to = __ballot_sync(kAllLanes, a >= kUpTo);
    const int last = up_to == 0 ? 31 : __ffs(static_cast<int>(up_to)) - 1;
    a = lane <= last ? a & kSaid : 0;
    t = lane <= last ? t & kSaid : 0;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      a += __shfl_xor_sync(kAllLanes, a, lanes);
      t += __shfl_xor_sync(kAllLanes, t, lanes);
    }
    above += a;
    ties += t;
    if (up_to != 0) break;
  }
  if (lane == 0) {
    store_volatile(row.above + tile, kUpTo | (above + own_above));
    store_volatile(row.ties + tile, kUpTo | (ties + own_ties));
  }
}

template <typename Keys>
struct Write {
  using Row = SelectRow;
  struct Scalars {};
  static constexpr int kLeastBlocks = 3;
  static int64_t tiles(const Row& row) { return tile_count(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    SHIRA_SHARED(shared, 3, uint64_t);  // what is before the tile; then the tile
    if (threadIdx.x == 0) shared[2] = atomicAdd(row.next, 1u);
    __syncthreads();
    const auto tile = static_cast<int64_t>(shared[2]);
    typename Keys::Key keys[kItems];
    uint32_t above = 0, ties = 0;
    Keys::each(row, tile, [&](int e, auto key) { keys[e] = key; });
    const int64_t cut = load_cached(&row.cut->key);
    const auto most = static_cast<uint64_t>(load_cached(&row.cut->ties));
#pragma unroll
    for (int e = 0; e < kItems; ++e) {
      above += keys[e] > cut;
      ties += keys[e] == cut;
    }
    uint64_t total;
    const uint64_t own = block_scan(both(above, ties), total, Plain{});
    if (threadIdx.x < 32) {
      uint64_t all_above, all_ties;
      look_back(row, tile, total >> 32, total & 0xFFFFFFFFu, all_above, all_ties);
      if (threadIdx.x == 0) {
        shared[0] = all_above;
        shared[1] = all_ties;
      }
    }
    __syncthreads();
    uint64_t own_above = shared[0] + (own >> 32), own_ties = shared[1] + (own & 0xFFFFFFFFu);
    const int64_t first = (tile * kThreads + threadIdx.x) * kItems;
#pragma unroll
    for (int e = 0; e < kItems; ++e) {
      const bool is_above = keys[e] > cut, ties_too = keys[e] == cut;
      if (is_above || (ties_too && own_ties < most)) {
        const uint64_t place = own_above + (own_ties < most ? own_ties : most);
        if (place >= static_cast<uint64_t>(row.k)) break;  // another stream writes to the weight, against the rules
        if (row.wide)
          store_stream(static_cast<int64_t*>(row.out) + place, first + e);
        else
          store_stream(static_cast<int32_t*>(row.out) + place, static_cast<int32_t>(first + e));
      }
      own_above += is_above;
      own_ties += ties_too;
    }
  }
};

template <typename Keys>
void select_by(SelectRow row, cudaStream_t stream) {
  row.first = true;
  for (int32_t bits = 8 * sizeof(typename Keys::Key) - 1; bits > 0; bits = row.shift) {
    row.shift = std::max(bits - kDigit, 0);
    row.bins = 1 << (bits - row.shift);
    launch_one<Histogram<Keys>>({}, row, stream);
    launch_one<Pick>({}, row, stream);
    row.first = false;
  }
  launch_one<Write<Keys>>({}, row, stream);
}

void select_short(const SelectRow& row, cudaStream_t stream) {
  const auto count = [&](auto kernel, int bytes) {
    // A block has more entries to count than counters to add up.
    constexpr int64_t kLeast = int64_t{kCounting} * kUnits * 8;
    const int64_t most = device_has(cudaDevAttrMultiProcessorCount);
    const auto blocks = static_cast<unsigned>(std::clamp<int64_t>(row.granules / kLeast, 1, most));
    SHIRA_LAUNCH_WITH(bytes, kernel, blocks, kCounting, stream, row);
  };
  constexpr int kBytes = kMagnitudes * sizeof(uint32_t);  // sm_80, 90 and 100 have them, sm_86, 89 and 120 do not
  if (device_has(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kBytes)
    count(count_magnitudes<uint32_t>, kBytes);
  else
    count(count_magnitudes<uint16_t>, kBytes / 2);
  launch_one<PickShort>({}, row, stream);
  launch_one<Write<Stored<Short>>>({}, row, stream);
}

template <typename W, typename G, Score score>
void select(SelectRow row, cudaStream_t stream) {
  using Own = Scores<W, G, score>;
  if (row.keys == nullptr) return select_by<Own>(row, stream);
  const auto sum = [&](auto vector) {
    constexpr bool kVector = decltype(vector)::value;
    using All = Sum<W, G, score, kWarps, kVector>;
    if (row.granule >= kWarps * All::kColumns)
      launch_one<All>({}, row, stream);
    else
      launch_one<Sum<W, G, score, 1, kVector>>({}, row, stream);
  };
  if (row.aligned && row.granule % Sum<W, G, score, 1, true>::kWide == 0)
    sum(std::true_type{});
  else
    sum(std::false_type{});
  row.stored = row.keys;
  row.aligned = true;
  select_by<Stored<Kept<typename Own::Key>>>(row, stream);
}

template <typename W>
void select(const SelectRow& row, Score score, bool narrow_grad, cudaStream_t stream) {
  const auto with = [&](auto gradient) {
    using G = decltype(gradient);
    if (score == Score::Grad)
      select<W, G, Score::Grad>(row, stream);
    else
      select<W, G, Score::Snip>(row, stream);
  };
  if (score == Score::Magnitude)
    select<W, W, Score::Magnitude>(row, stream);
  else if (narrow_grad)
    with(core::Float32{});
  else
    with(W{});
}

// ---- select_random ---------------------------------------------------------------------------------------

struct DrawRow {
  void* out;
  int64_t k;
  bool wide;
};

struct Draw {
  using Row = DrawRow;
  struct Scalars {
    core::Permutation permutation;
  };
  static int64_t tiles(const Row& row) { return (row.k + kThreads - 1) / kThreads; }
  static __device__ void tile(const Scalars& scalars, const Row& row, int64_t tile) {
    const core::Permutation& permutation = scalars.permutation;
    const int64_t i = tile * kThreads + threadIdx.x;
    if (i >= row.k) return;
    uint64_t image = permutation(static_cast<uint64_t>(i));
    while (image >= permutation.domain) image = permutation(image);
    if (row.wide)
      store_stream(static_cast<int64_t*>(row.out) + i, static_cast<int64_t>(image));
    else
      store_stream(static_cast<int32_t*>(row.out) + i, static_cast<int32_t>(image));
  }
};

Tensor sorted(const Tensor& tensor) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(tensor), torch::stable::detail::from(int64_t{-1}),
                                    torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "", stack.data(), TORCH_ABI_VERSION));
  const auto order = torch::stable::detail::to<Tensor>(stack[1]);  // owned from here on
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// ---- as csrc/ops/select.h calls them -----------------------------------------------------------------------

struct Cuda {
  static Tensor top(const Tensor& weight, const Tensor* grad, int64_t k, Score score, int64_t granule) {
    const int64_t granules = weight.numel() / granule;
    const Tensor indices = torch::stable::new_empty(weight, {k}, index_type(granules));
    if (k == 0) return indices;
    const Device device(weight);
    SelectRow row{};
    row.weight = address<const void>(weight);
    row.grad = grad == nullptr ? nullptr : address<const void>(*grad);
    row.granule = granule;
    row.granules = granules;
    row.k = k;
    row.out = address<void>(indices);
    row.wide = indices.scalar_type() == ScalarType::Long;
    row.rounds = static_cast<int32_t>(std::clamp<int64_t>(granules / (int64_t{kTile} * kBlocks), 1, kMostRounds));
    row.aligned = widest_unit(16, row.weight, row.grad) == 16;
    const Tensor& scored = score == Score::Grad ? *grad : weight;
    const bool shorts = granule == 1 && score != Score::Snip && scored.element_size() == sizeof(uint16_t);
    // The cut, the next tile, the histogram, and what the tiles publish; for long granules, the keys too.
    const int64_t bins = shorts ? kMagnitudes + kGroups : kBins;
    const int64_t tiles = tile_count(row), size = 3 + bins + 2 * tiles;
    const Tensor scratch = torch::stable::new_empty(weight, {size}, ScalarType::Long);
    auto* room = address<int64_t>(scratch);
    row.cut = reinterpret_cast<Cut*>(room);
    row.next = reinterpret_cast<uint32_t*>(room + 2);
    row.histogram = reinterpret_cast<unsigned long long*>(room + 3);
    row.groups = row.histogram + kMagnitudes;
    row.above = reinterpret_cast<uint64_t*>(room + 3 + bins);
    row.ties = row.above + tiles;
    SHIRA_CUDA_CHECK(cudaMemsetAsync(room, 0, static_cast<size_t>(size) * sizeof(int64_t), device.stream));
    if (shorts) {
      row.stored = score == Score::Grad ? row.grad : row.weight;
      row.infinity = scored.scalar_type() == ScalarType::Half ? 0x7C00 : 0x7F80;
      select_short(row, device.stream);
      return indices;
    }
    const bool doubles = weight.scalar_type() == ScalarType::Double;
    const Tensor keys = torch::stable::new_empty(weight, {granule >= kLong ? granules : 0},
                                                 doubles ? ScalarType::Long : ScalarType::Int);
    if (granule >= kLong) row.keys = address<void>(keys);
    const bool narrow = grad != nullptr && grad->scalar_type() != weight.scalar_type();
    switch (weight.scalar_type()) {
      case ScalarType::Half: select<core::Float16>(row, score, narrow, device.stream); break;
      case ScalarType::BFloat16: select<core::BFloat16>(row, score, narrow, device.stream); break;
      case ScalarType::Float: select<core::Float32>(row, score, false, device.stream); break;
      default: select<core::Float64>(row, score, narrow, device.stream); break;
    }
    return indices;
  }

  static void random(const core::Permutation& permutation, Tensor& indices) {
    const Device device(indices);
    const DrawRow row{address<void>(indices), indices.numel(), indices.scalar_type() == ScalarType::Long};
    launch_one<Draw>({permutation}, row, device.stream);
    indices = sorted(indices);
  }
};

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::SelectOps<shira::cuda::Cuda>::implement(m);
}
