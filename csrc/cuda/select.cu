// The select family on CUDA.
//
// select_top: the exact top-k without a score tensor, and without a word to the host. The k-th highest key is found
// digit by digit, 11 bits at a time from the top: a pass over the weight counts the keys of each digit within what the
// digits before left open, and one block picks the digit that holds the k-th. With the cut known, tiles count what they
// select, a scan tells each where it writes, and a last pass writes in order. Five passes for float32 scores, four
// where a score is an entry of 16 bits, each at the speed of memory (a thread has all of its entries on their way
// before it scores the first); scores are made anew in each.
//
// select_random: the images of 0 .. k-1, sorted by torch.
#include "../ops/select.h"
#include "block.h"
#include "scan.h"

namespace shira::cuda {
namespace {

using core::Score;

constexpr int kItems = 4;
constexpr int kTile = kThreads * kItems;
constexpr int kDigit = 11, kBins = 1 << kDigit;

// ---- select_top ------------------------------------------------------------------------------------------

// Selected are all keys above `key`, and of those equal to it the first `ties`.
struct Cut {
  int64_t key;  // while it is being found: the digits found so far
  int64_t ties;
};

struct SelectRow {
  const void *weight, *grad;
  int64_t granule, granules;
  Cut* cut;
  unsigned long long* histogram;  // [kBins], zeros before and after every digit
  uint64_t *above, *ties;         // of each tile; then before it
  void* out;
  int64_t k;
  int32_t shift, drop;  // of the digit; the low bits of a score that are always 0
  int32_t rounds;       // tiles of a block that counts digits: what it does once it does for all of them
  bool first, wide;
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
  // f(k, key) for each of a thread's granules of a tile; the key is below 0 past the last one.
  template <typename F>
  static __device__ __forceinline__ void each(const SelectRow& row, int64_t tile, const F& f) {
    const int64_t begin = tile * kTile, rest = row.granules - begin;
    const int thread = static_cast<int>(threadIdx.x), left = rest < kTile ? static_cast<int>(rest) : kTile;
    if (row.granule == 1) {
      const auto* const weights = static_cast<const Weight*>(row.weight) + begin + thread;
      const auto* const grads =
          score == Score::Magnitude ? nullptr : static_cast<const Grad*>(row.grad) + begin + thread;
      Weight weight[kItems] = {};
      Grad grad[kItems] = {};
#pragma unroll
      for (int k = 0; k < kItems; ++k)
        if (thread + k * kThreads < left) load(weights, grads, k * kThreads, weight[k], grad[k]);
#pragma unroll
      for (int k = 0; k < kItems; ++k)
        f(k,
          thread + k * kThreads < left ? key(row, core::entry_score<W, G, score>(&weight[k], &grad[k], 0)) : Key{-1});
      return;
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t number = begin + thread + k * kThreads;
      typename W::Compute total = 0;
      if (thread + k * kThreads < left)
        for (int64_t i = number * row.granule; i < (number + 1) * row.granule; ++i) {
          Weight weight = 0;
          Grad grad = 0;
          load(row.weight, row.grad, i, weight, grad);
          total += core::entry_score<W, G, score>(&weight, &grad, 0);  // in the entries' order
        }
      f(k, thread + k * kThreads < left ? key(row, total) : Key{-1});
    }
  }
};

template <typename W, typename G, Score score>
struct Histogram {
  using Row = SelectRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return (tile_count(row) + row.rounds - 1) / row.rounds; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    using Key = core::Key<typename W::Compute>;
    using Bits = std::make_unsigned_t<Key>;
    SHIRA_SHARED(bins, kBins, uint32_t);
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    const Bits base = static_cast<Bits>(load_cached(&row.cut->key));
    for (int32_t round = 0; round < row.rounds; ++round)
      Scores<W, G, score>::each(row, tile * row.rounds + round, [&](int, Key key) {
        // Keys below the base wrap to large numbers.
        const Bits bin = static_cast<Bits>(static_cast<Bits>(key) - base) >> row.shift;
        if (key >= 0 && bin < kBins) atomicAdd(bins + bin, 1u);
      });
    __syncthreads();
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads)
      if (bins[bin] != 0) atomicAdd(row.histogram + bin, static_cast<unsigned long long>(bins[bin]));
  }
};

// One block: the bin that holds the k-th highest key. Every thread has kBins / kThreads of them, from the top.
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
    uint64_t above = block_scan(sum, total, Plain{});  // a barrier: every thread has read the cut
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      if (above < wanted && wanted <= above + count[k]) {  // of one thread alone
        const int64_t bin = kBins - 1 - (static_cast<int>(threadIdx.x) * kOwn + k);
        store_stream(&row.cut->key, cut.key + (bin << row.shift));
        store_stream(&row.cut->ties, static_cast<int64_t>(wanted - above));
      }
      above += count[k];
    }
  }
};

// Two counts below 2^32 in one sum.
__device__ __forceinline__ uint64_t both(uint32_t above, uint32_t ties) { return uint64_t{above} << 32 | ties; }

template <typename W, typename G, Score score>
struct Count {
  using Row = SelectRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return tile_count(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    const int64_t cut = load_cached(&row.cut->key);
    uint32_t above = 0, ties = 0;
    Scores<W, G, score>::each(row, tile, [&](int, int64_t key) {
      above += key > cut;
      ties += key == cut;
    });
    const uint64_t sum = block_sum(both(above, ties));
    if (threadIdx.x > 0) return;
    store_stream(row.above + tile, sum >> 32);
    store_stream(row.ties + tile, sum & 0xFFFFFFFFu);
  }
};

template <typename W, typename G, Score score>
struct Write {
  using Row = SelectRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return tile_count(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    SHIRA_SHARED(counts, kItems * kWarps, uint64_t);  // of a warp's item; then of all before it
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
    const uint32_t lower = (1u << thread % 32) - 1;
    const int64_t cut = load_cached(&row.cut->key);
    const auto most = static_cast<uint64_t>(load_cached(&row.cut->ties));
    core::Key<typename W::Compute> keys[kItems];
    Scores<W, G, score>::each(row, tile, [&](int k, auto key) { keys[k] = key; });
    uint32_t above[kItems], ties[kItems];  // which lanes
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      above[k] = __ballot_sync(kAllLanes, keys[k] > cut);
      ties[k] = __ballot_sync(kAllLanes, keys[k] == cut);
      if (thread % 32 == 0) counts[k * kWarps + warp] = both(__popc(above[k]), __popc(ties[k]));
    }
    __syncthreads();
    uint64_t total;
    const uint64_t before = block_scan(thread < kItems * kWarps ? counts[thread] : 0, total, Plain{});
    if (thread < kItems * kWarps) counts[thread] = before;
    __syncthreads();
    const uint64_t all_above = load_stream(row.above + tile), all_ties = load_stream(row.ties + tile);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const uint64_t own = counts[k * kWarps + warp];
      const uint64_t own_ties = all_ties + (own & 0xFFFFFFFFu) + static_cast<uint64_t>(__popc(ties[k] & lower));
      if (keys[k] < cut || keys[k] < 0 || (keys[k] == cut && own_ties >= most)) continue;
      const uint64_t own_above = all_above + (own >> 32) + static_cast<uint64_t>(__popc(above[k] & lower));
      const uint64_t place = own_above + (own_ties < most ? own_ties : most);
      const int64_t at = tile * kTile + k * kThreads + thread;
      if (row.wide)
        store_stream(static_cast<int64_t*>(row.out) + place, at);
      else
        store_stream(static_cast<int32_t*>(row.out) + place, static_cast<int32_t>(at));
    }
  }
};

// How many low bits of every score are 0: those that a 16-bit entry gains as a float32.
template <typename W, typename G, Score score>
constexpr int32_t low_bits() {
  if constexpr (score == Score::Snip) return 0;
  using Entry = std::conditional_t<score == Score::Grad, G, W>;
  return std::is_same_v<Entry, core::BFloat16> ? 16 : std::is_same_v<Entry, core::Float16> ? 13 : 0;
}

template <typename W, typename G, Score score>
void select(SelectRow row, cudaStream_t stream) {
  row.drop = row.granule == 1 ? low_bits<W, G, score>() : 0;
  const int bits = static_cast<int>(8 * sizeof(typename W::Compute)) - row.drop;
  row.first = true;
  for (row.shift = (bits - 1) / kDigit * kDigit; row.shift >= 0; row.shift -= kDigit) {
    launch_one<Histogram<W, G, score>>({}, row, stream);
    launch_one<Pick>({}, row, stream);
    row.first = false;
  }
  launch_one<Count<W, G, score>>({}, row, stream);
  launch_list<Scan>({}, {{row.above, tile_count(row)}, {row.ties, tile_count(row)}}, stream);
  launch_one<Write<W, G, score>>({}, row, stream);
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

constexpr int kBlocks = 1024, kMostRounds = 16;  // about as many blocks as the largest GPUs run at once

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
    // The cut, the histogram, and the tiles' two counts with their totals.
    const int64_t tiles = tile_count(row), size = 2 + kBins + 2 * (tiles + 1);
    const Tensor scratch = torch::stable::new_empty(weight, {size}, ScalarType::Long);
    auto* room = address<int64_t>(scratch);
    row.cut = reinterpret_cast<Cut*>(room);
    row.histogram = reinterpret_cast<unsigned long long*>(room + 2);
    row.above = reinterpret_cast<uint64_t*>(room + 2 + kBins);
    row.ties = row.above + tiles + 1;
    SHIRA_CUDA_CHECK(cudaMemsetAsync(room, 0, (2 + kBins) * sizeof(int64_t), device.stream));
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
