// select_top on CUDA: the exact top-k without a score tensor, and without a word to the host.
//
// The k-th highest key is found digit by digit, 11 bits at a time from the top: a pass over the weight counts the keys
// of each digit within what the digits before left open, and one block picks the digit that holds the k-th. With the
// cut known, tiles count what they select, a scan tells each where it writes, and a last pass writes in order. Five
// passes for float32 scores, each at the speed of memory; scores are made anew in each.
#include "../select_ops.h"
#include "block.h"
#include "scan.h"

namespace shira::cuda {
namespace {

using core::Score;

constexpr int kItems = 4;
constexpr int kTile = kThreads * kItems;
constexpr int kDigit = 11, kBins = 1 << kDigit;

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
  int32_t shift;
  bool wide;
};

int64_t tile_count(const SelectRow& row) { return (row.granules + kTile - 1) / kTile; }

template <typename W, typename G, Score score>
__device__ __forceinline__ core::Key<typename W::Compute> key_of(const SelectRow& row, int64_t number) {
  typename W::Compute total = 0;
  for (int64_t i = number * row.granule; i < (number + 1) * row.granule; ++i) {
    const auto weight =
        score == Score::Grad ? typename W::Bits{0} : load_cached(static_cast<const typename W::Bits*>(row.weight) + i);
    const auto grad = score == Score::Magnitude ? typename G::Bits{0}
                                                : load_cached(static_cast<const typename G::Bits*>(row.grad) + i);
    total += core::entry_score<W, G, score>(&weight, &grad, 0);  // in the entries' order
  }
  return core::score_key(total);
}

template <typename W, typename G, Score score>
struct Histogram {
  using Row = SelectRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return tile_count(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    using Key = core::Key<typename W::Compute>;
    using Bits = std::make_unsigned_t<Key>;
    SHIRA_SHARED(bins, kBins, uint32_t);
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) bins[bin] = 0;
    __syncthreads();
    const Key base = static_cast<Key>(load_cached(&row.cut->key));
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t at = tile * kTile + k * kThreads + threadIdx.x;
      if (at >= row.granules) continue;
      // Keys below the base wrap to large numbers.
      const Bits bin =
          static_cast<Bits>(static_cast<Bits>(key_of<W, G, score>(row, at)) - static_cast<Bits>(base)) >> row.shift;
      if (bin < kBins) atomicAdd(bins + bin, 1u);
    }
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
    const Cut cut{load_stream(&row.cut->key), load_stream(&row.cut->ties)};
    uint64_t count[kOwn], sum = 0, total;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      unsigned long long* const bin = row.histogram + (kBins - 1 - (static_cast<int>(threadIdx.x) * kOwn + k));
      count[k] = load_stream(bin);
      store_stream(bin, 0ull);
      sum += count[k];
    }
    const uint64_t wanted = static_cast<uint64_t>(cut.ties);
    uint64_t above = block_scan(sum, total, Plain{});
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

template <typename W, typename G, Score score>
struct Count {
  using Row = SelectRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return tile_count(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    const int64_t cut = load_cached(&row.cut->key);
    uint64_t above = 0, ties = 0;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t at = tile * kTile + k * kThreads + threadIdx.x;
      if (at >= row.granules) continue;
      const int64_t key = key_of<W, G, score>(row, at);
      above += key > cut;
      ties += key == cut;
    }
    above = block_sum(above);
    ties = block_sum(ties);
    if (threadIdx.x > 0) return;
    store_stream(row.above + tile, above);
    store_stream(row.ties + tile, ties);
  }
};

template <typename W, typename G, Score score>
struct Write {
  using Row = SelectRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return tile_count(row); }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    const int64_t cut = load_cached(&row.cut->key);
    const auto most = static_cast<uint64_t>(load_cached(&row.cut->ties));
    uint64_t above = load_stream(row.above + tile), ties = load_stream(row.ties + tile);
    for (int k = 0; k < kItems; ++k) {
      const int64_t at = tile * kTile + k * kThreads + threadIdx.x;
      const int64_t key = at < row.granules ? static_cast<int64_t>(key_of<W, G, score>(row, at)) : -1;
      uint64_t all_above, all_ties;
      const uint64_t own_above = above + block_scan(key > cut, all_above, Plain{});
      const uint64_t own_ties = ties + block_scan(key == cut, all_ties, Plain{});
      above += all_above;
      ties += all_ties;
      if (key < cut || key < 0 || (key == cut && own_ties >= most)) continue;
      const uint64_t place = own_above + (own_ties < most ? own_ties : most);
      if (row.wide)
        store_stream(static_cast<int64_t*>(row.out) + place, at);
      else
        store_stream(static_cast<int32_t*>(row.out) + place, static_cast<int32_t>(at));
    }
  }
};

template <typename W, typename G, Score score>
void select(SelectRow row, cudaStream_t stream) {
  constexpr int kFirst = sizeof(typename W::Bits) == 8 ? 5 * kDigit : 2 * kDigit;
  for (row.shift = kFirst; row.shift >= 0; row.shift -= kDigit) {
    launch_one<Histogram<W, G, score>>({}, row, stream);
    launch_one<Pick>({}, row, stream);
  }
  launch_one<Count<W, G, score>>({}, row, stream);
  launch_one<Scan>({}, {row.above, tile_count(row)}, stream);
  launch_one<Scan>({}, {row.ties, tile_count(row)}, stream);
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
    // The cut, the histogram, and the tiles' two counts with their totals.
    const int64_t tiles = tile_count(row), size = 2 + kBins + 2 * (tiles + 1);
    const Tensor scratch = torch::stable::new_empty(weight, {size}, ScalarType::Long);
    auto* room = address<int64_t>(scratch);
    row.cut = reinterpret_cast<Cut*>(room);
    row.histogram = reinterpret_cast<unsigned long long*>(room + 2);
    row.above = reinterpret_cast<uint64_t*>(room + 2 + kBins);
    row.ties = row.above + tiles + 1;
    SHIRA_CUDA_CHECK(cudaMemsetAsync(room, 0, (2 + kBins) * sizeof(int64_t), device.stream));
    launch_one<Begin>({}, row, device.stream);
    const bool narrow = grad != nullptr && grad->scalar_type() != weight.scalar_type();
    switch (weight.scalar_type()) {
      case ScalarType::Half: select<core::Float16>(row, score, narrow, device.stream); break;
      case ScalarType::BFloat16: select<core::BFloat16>(row, score, narrow, device.stream); break;
      case ScalarType::Float: select<core::Float32>(row, score, false, device.stream); break;
      default: select<core::Float64>(row, score, narrow, device.stream); break;
    }
    return indices;
  }

  // A search for the k-th starts with k of whatever key; written by a kernel, so that a captured graph holds it.
  struct Begin {
    using Row = SelectRow;
    struct Scalars {};
    static int64_t tiles(const Row&) { return 1; }
    static __device__ void tile(const Scalars&, const Row& row, int64_t) {
      if (threadIdx.x == 0) store_stream(&row.cut->ties, row.k);
    }
  };
};

}  // namespace
}  // namespace shira::cuda

STABLE_TORCH_LIBRARY_IMPL(SHIRA_LIB, SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::SelectOps<shira::cuda::Cuda>::implement(m);
}
