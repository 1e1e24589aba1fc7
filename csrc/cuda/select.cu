// The select family on CUDA.
//
// select_top: the exact top-k without a score tensor and without waiting for the host. The k-th highest key is found
// digit by digit, 11 bits at a time from the top: a pass over the weight counts the next digits of the keys that agree
// with the digits found so far, and one block picks the digit that holds the k-th. Once the cut is known, a last pass
// writes in order: a tile learns its offset from the tiles before it, which publish their counts as soon as they know
// them. This takes four passes for float32 scores, three if a score is one 16-bit entry, each at the speed of memory (a
// thread has all its entries in flight before it scores the first). Each pass computes the scores again, except for
// granules of kLong entries or more: their keys take at most an eighth of the weight's memory, and are computed once.
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
  unsigned long long* histogram;  // [kBins], zeros before and after every digit
  uint64_t *above, *ties;         // what each tile has published; zeros at first
  uint32_t* next;                 // the next tile to take
  void* keys;                     // for granules of kLong entries or more
  void* out;
  int64_t k;
  int32_t shift, drop;  // the digit's lowest bit; how many low bits of a score are always 0
  int32_t rounds;       // tiles per counting block, which adds up its histogram once for all of them
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
  static __device__ __forceinline__ Key key(const SelectRow& row, typename W::Compute total) {
    const Key whole = core::score_key(total);
    return whole == 0 ? 0 : ((whole - 1) >> row.drop) + 1;
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
      for (int e = 0; e < kItems; ++e) f(e, key(row, core::entry_score<W, G, score>(weight.entry, grad.entry, e)));
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
      f(e, e < left ? key(row, total) : Key{-1});
    }
  }
};

// Keys that were computed before.
template <typename KeyOf>
struct Kept {
  using Key = KeyOf;
  template <typename F>
  static __device__ __forceinline__ void each(const SelectRow& row, int64_t tile, const F& f) {
    const int64_t run = tile * kThreads + threadIdx.x;
    if ((tile + 1) * kTile <= row.granules) {
      const auto keys = Pack<Key, kItems>::cached(row.keys, run);
#pragma unroll
      for (int e = 0; e < kItems; ++e) f(e, keys.entry[e]);
      return;
    }
#pragma unroll
    for (int e = 0; e < kItems; ++e) {
      const int64_t at = run * kItems + e;
      f(e, at < row.granules ? load_cached(static_cast<const Key*>(row.keys) + at) : Key{-1});
    }
  }
};

// Computes the keys of long granules. A sum is in entry order, so one thread makes it; but the whole block loads, in
// whole lines, for the lanes that add. kTeam warps load for the 32 granules of one of them: all warps, if granules are
// longer than what one warp loads of each at a time.
template <typename W, typename G, Score score, int kTeam>
struct Sum {
  using Row = SelectRow;
  struct Scalars {};
  static constexpr int kLeastBlocks = 4;
  using C = typename W::Compute;
  using Own = Scores<W, G, score>;
  static constexpr int kColumns = 128 / sizeof(C), kPitch = kColumns + 1;  // no bank conflicts
  static constexpr int kGranules = kThreads / kTeam;
  static constexpr int kAtOnce = score == Score::Snip ? 4 : 8;

  static int64_t tiles(const Row& row) { return (row.granules + kGranules - 1) / kGranules; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    SHIRA_SHARED(terms, kWarps * 32 * kPitch, C);
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    C* const own = terms + warp * 32 * kPitch;
    const int64_t first = tile * kGranules + warp / kTeam * 32;
    C total = 0;
    for (int64_t begin = 0; begin < row.granule; begin += kTeam * kColumns) {
      const int64_t from = begin + warp % kTeam * kColumns;
#pragma unroll kAtOnce
      for (int i = 0; i < kColumns; ++i) {
        const int at = i * 32 + lane, line = at / kColumns, column = at % kColumns;
        typename Own::Weight weight = 0;
        typename Own::Grad grad = 0;
        const bool is = first + line < row.granules && from + column < row.granule;
        if (is) Own::load(row.weight, row.grad, (first + line) * row.granule + from + column, weight, grad);
        if (is) own[line * kPitch + column] = core::entry_score<W, G, score>(&weight, &grad, 0);
      }
      __syncthreads();
      if (warp % kTeam == 0) {
        const int64_t left = row.granule - begin;
        const int count = left < kTeam * kColumns ? static_cast<int>(left) : kTeam * kColumns;
        for (int part = 0; part * kColumns < count; ++part)
#pragma unroll 8
          for (int column = 0; column < kColumns; ++column)
            if (part * kColumns + column < count) total += own[(part * 32 + lane) * kPitch + column];
      }
      __syncthreads();
    }
    if (warp % kTeam == 0 && first + lane < row.granules)
      store_stream(static_cast<typename Own::Key*>(row.keys) + first + lane, core::score_key(total));
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
        if (key >= 0 && bin < kBins) atomicAdd(bins + bin, 1u);
      });
    __syncthreads();
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads)
      if (bins[bin] != 0) atomicAdd(row.histogram + bin, static_cast<unsigned long long>(bins[bin]));
  }
};

// One block finds the bin that holds the k-th highest key. Each thread has kBins / kThreads bins, from the top.
struct Pick {
  using Row = SelectRow;
  struct Scalars {};
  static int64_t tiles(const Row&) { return 1; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    constexpr int kOwn = kBins / kThreads;
    const Cut cut{load_stream(&row.cut->key), row.first ? row.k : load_stream(&row.cut->ties)};
    uint64_t count[kOwn], sum = 0, total;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      unsigned long long* const bin = row.histogram + (kBins - 1 - (static_cast<int>(threadIdx.x) * kOwn + k));
      count[k] = load_stream(bin);
      store_stream(bin, 0ull);
      sum += count[k];
    }
    const uint64_t wanted = static_cast<uint64_t>(cut.ties);
    uint64_t above = block_scan(sum, total, Plain{});  // also a barrier: every thread has read the cut
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      if (above < wanted && wanted <= above + count[k]) {  // true in one thread only
        const int64_t bin = kBins - 1 - (static_cast<int>(threadIdx.x) * kOwn + k);
        store_stream(&row.cut->key, cut.key + (bin << row.shift));
        store_stream(&row.cut->ties, static_cast<int64_t>(wanted - above));
      }
      above += count[k];
    }
  }
};

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

// How many low bits of every score are 0: those that a 16-bit entry gains when it is widened to float32.
template <typename W, typename G, Score score>
constexpr int32_t low_bits() {
  if constexpr (score == Score::Snip) return 0;
  using Entry = std::conditional_t<score == Score::Grad, G, W>;
  return std::is_same_v<Entry, core::BFloat16> ? 16 : std::is_same_v<Entry, core::Float16> ? 13 : 0;
}

template <typename Keys>
void select_by(SelectRow row, int bits, cudaStream_t stream) {
  row.first = true;
  for (row.shift = (bits - 1) / kDigit * kDigit; row.shift >= 0; row.shift -= kDigit) {
    launch_one<Histogram<Keys>>({}, row, stream);
    launch_one<Pick>({}, row, stream);
    row.first = false;
  }
  launch_one<Write<Keys>>({}, row, stream);
}

template <typename W, typename G, Score score>
void select(SelectRow row, cudaStream_t stream) {
  using Own = Scores<W, G, score>;
  row.drop = row.granule == 1 ? low_bits<W, G, score>() : 0;
  const int bits = static_cast<int>(8 * sizeof(typename W::Compute)) - row.drop;
  if (row.keys == nullptr) return select_by<Own>(row, bits, stream);
  using All = Sum<W, G, score, kWarps>;
  if (row.granule >= kWarps * All::kColumns)
    launch_one<All>({}, row, stream);
  else
    launch_one<Sum<W, G, score, 1>>({}, row, stream);
  select_by<Kept<typename Own::Key>>(row, bits, stream);
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
    // The cut, the histogram, the next tile, and what the tiles publish; for long granules, the keys too.
    const int64_t tiles = tile_count(row), size = 2 + kBins + 1 + 2 * tiles;
    const Tensor scratch = torch::stable::new_empty(weight, {size}, ScalarType::Long);
    auto* room = address<int64_t>(scratch);
    row.cut = reinterpret_cast<Cut*>(room);
    row.histogram = reinterpret_cast<unsigned long long*>(room + 2);
    row.next = reinterpret_cast<uint32_t*>(room + 2 + kBins);
    row.above = reinterpret_cast<uint64_t*>(room + 2 + kBins + 1);
    row.ties = row.above + tiles;
    SHIRA_CUDA_CHECK(cudaMemsetAsync(room, 0, static_cast<size_t>(size) * sizeof(int64_t), device.stream));
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
