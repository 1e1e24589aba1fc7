// Products with sparse matrices on CUDA: one launch for all adapters, with an adapter named for each token.
//
// A block handles some tokens and some rows of their matrix, which it finds in the sorted indices by bisection. The
// input of its tokens is staged in shared memory, some columns at a time, transposed so that the tokens of a column lie
// side by side; each thread keeps its place in its rows. Eight threads share a row: one per token or, with few tokens
// per adapter, all eight for a single token, whose entries they take in turn. Which of the two depends on the shapes
// alone, and so does the order of a sum.
//
// For the transposed product, the mask is turned first: sorted by column, on the device.
#include "../ops/overlay.h"

#include <array>

#include "../core/arithmetic.h"
#include "../dispatch.h"
#include "block.h"
#include "table.h"

namespace shira::cuda {
namespace {

constexpr int kShare = 8;                  // threads per row
constexpr int kSlots = kThreads / kShare;  // slots per block,
constexpr int kEach = 4;                   // and rows per slot
constexpr int kBlockRows = kSlots * kEach;
constexpr int kStagedBytes = 32 << 10;  // for the input

struct Delta {
  const void* values;
  const void* indices;
  int64_t count;
  int64_t wide;  // whether indices are int64

  __device__ __forceinline__ Indices list() const { return {indices, count, wide != 0}; }
};

constexpr int kFew = 64;  // this many adapters travel with the launch; more are put into a table on the device first

struct OverlayRow {
  const void* input;
  void* output;
  const int32_t* adapters;  // null: all tokens have the first adapter,
  const void* alphas;       // and its sums are the output
  const Delta* many;        // on the device, if there are more than kFew
  Delta few[kFew];
  int64_t count, tokens, features, out_features, limit, row_blocks;
  Granule granule;
};

// The first entry of the sorted list at or after `place`. The result counts entries; granules [low, high) are searched.
__device__ __forceinline__ int64_t entry_at(const Indices& list, const Granule& granule, int64_t place, int64_t low,
                                            int64_t high) {
  int64_t count = high - low;
  while (count > 0) {
    const int64_t half = count / 2;
    if ((list.cached(low + half) + 1) * granule.units <= place) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  if (low >= list.count) return list.count * granule.units;
  const int64_t past = place - list.cached(low) * granule.units;
  return low * granule.units + (past > 0 && past < granule.units ? past : 0);
}

__device__ __forceinline__ float fused(float a, float b, float sum) { return fmaf(a, b, sum); }
__device__ __forceinline__ double fused(double a, double b, double sum) { return fma(a, b, sum); }

template <typename W, typename V, int kTokens>
struct Overlay {
  using C = typename W::Compute;
  static constexpr int kParts = kShare / kTokens, kStaged = kStagedBytes / static_cast<int>(sizeof(C)),
                       kColumns = kStaged / kTokens;

  static __device__ void block(const OverlayRow& row, int64_t block) {
    const int64_t token_first = block / row.row_blocks * kTokens, row_first = block % row.row_blocks * kBlockRows;
    SHIRA_SHARED(names, kTokens, int32_t);
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < kTokens) {
      const int64_t token = token_first + thread;
      names[thread] = token >= row.tokens ? -1 : row.adapters == nullptr ? 0 : load_stream(row.adapters + token);
    }
    __syncthreads();
    for (int k = 0; k < kTokens; ++k) {
      const int32_t name = names[k];
      bool seen = name < 0 || name >= row.count;
      for (int before = 0; before < k; ++before) seen |= names[before] == name;
      if (seen) continue;  // the whole block agrees
      C alpha = 1;
      if (row.alphas != nullptr) {
        alpha = load_cached(static_cast<const C*>(row.alphas) + name);
        if (alpha == 0) continue;
      }
      one(row, row.many == nullptr ? row.few[name] : fetched(row.many + name), alpha, names, name, token_first,
          row_first);
    }
  }

  static __device__ __forceinline__ Delta fetched(const Delta* delta) {
    const auto* const word = reinterpret_cast<const uint64_t*>(delta);
    return {reinterpret_cast<const void*>(load_cached(word)), reinterpret_cast<const void*>(load_cached(word + 1)),
            static_cast<int64_t>(load_cached(word + 2)), static_cast<int64_t>(load_cached(word + 3))};
  }

  static __device__ __forceinline__ void one(const OverlayRow& row, const Delta& delta, C alpha, const int32_t* names,
                                             int32_t name, int64_t token_first, int64_t row_first) {
    SHIRA_SHARED(staged, kStaged, C);
    const int thread = static_cast<int>(threadIdx.x), own = thread % kTokens, part = thread / kTokens % kParts;
    const int64_t token = token_first + own, first = row_first + thread / kShare * kEach;
    const bool mine = names[own] == name;
    const Indices list = delta.list();
    const int64_t rows = row.out_features, features = row.features;

    // Places in the rows count from the block's first entry.
    const int64_t last = row_first + kBlockRows < rows ? row_first + kBlockRows : rows;
    const int64_t base = entry_at(list, row.granule, row_first * features, 0, list.count);
    const int64_t low = base / row.granule.units;
    const int64_t stop = entry_at(list, row.granule, last * features, low, list.count) / row.granule.units;
    const int64_t high = stop < list.count ? stop + 1 : list.count;
    int32_t at[kEach], end[kEach];
    C sum[kEach];
    const auto place = [&](int64_t line) {
      return static_cast<int32_t>(entry_at(list, row.granule, (line < rows ? line : rows) * features, low, high) -
                                  base);
    };
    int32_t bound = place(first);
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
      at[r] = bound + part;
      bound = place(first + r + 1);
      end[r] = mine ? bound : 0;
      sum[r] = 0;
    }
    const int32_t wide = static_cast<int32_t>(features);
    for (int32_t begin = 0; begin < wide; begin += kColumns) {
      const int32_t columns = wide - begin < kColumns ? wide - begin : kColumns;
      __syncthreads();  // the previous columns may still be read
#pragma unroll 1
      for (int t = 0; t < kTokens; ++t) {
        if (names[t] != name) continue;
        const auto* const from = static_cast<const typename W::Bits*>(row.input) + (token_first + t) * features + begin;
        for (int32_t c = thread; c < columns; c += kThreads) staged[c * kTokens + t] = W::load(load_cached(from + c));
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < kEach; ++r) {
        const int64_t start = (first + r) * features + begin;
        while (at[r] < end[r]) {
          const int64_t entry = base + at[r];
          int64_t number, offset;
          row.granule.split(entry, number, offset);
          const int64_t index = list.cached(number), column = index * row.granule.units + offset - start;
          const bool inside = within(index, row.limit);
          if (inside && column >= columns) break;  // not staged yet
          if (inside && column >= 0) {
            const auto* const value = static_cast<const typename V::Bits*>(delta.values) + entry;
            sum[r] = fused(static_cast<C>(V::load(load_cached(value))),
                           staged[static_cast<int32_t>(column) * kTokens + own], sum[r]);
          }
          at[r] += kParts;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kEach; ++r) {
#pragma unroll
      for (int lanes = kShare / 2; lanes >= kTokens; lanes /= 2) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], lanes);
      if (!mine || part != 0 || first + r >= rows) continue;
      auto* const to = static_cast<typename W::Bits*>(row.output) + token * rows + first + r;
      store_stream(to, W::store(row.alphas == nullptr ? sum[r] : W::load(load_weight(to)) + alpha * sum[r]));
    }
  }
};

// With a bound of two blocks per multiprocessor, ptxas does not spill to fit more of them.
template <typename W, typename V, int kTokens>
__global__ void __launch_bounds__(kThreads, 2) overlay_kernel(SHIRA_PARAMETER(row, OverlayRow)) {
  Overlay<W, V, kTokens>::block(row, static_cast<int64_t>(blockIdx.x));
}

// The sort key of each entry of a mask: by column, then by row; past all others if its index is out of range.
struct KeyRow {
  Indices indices;
  int64_t* keys;
  int64_t limit, rows;
  Granule granule, columns;
};

struct Keys {
  using Row = KeyRow;
  struct Scalars {};
  static constexpr int kItems = 4, kTile = kThreads * kItems;
  static int64_t tiles(const Row& row) { return (row.indices.count * row.granule.units + kTile - 1) / kTile; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    const int64_t total = row.indices.count * row.granule.units, begin = tile * kTile, end = begin + kTile;
    const Items<kItems> items(row.indices, row.granule, begin, end < total ? end : total);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (!items.is(k)) continue;
      const int64_t all = row.limit * row.granule.units;
      int64_t line = 0, column = 0;
      const bool inside = within(items.index[k], row.limit);
      row.columns.split(inside ? items.index[k] * row.granule.units + items.offset[k] : 0, line, column);
      store_stream(row.keys + items.at(k), inside ? column * row.rows + line : all);
    }
  }
};

// A mask and its values as those of the transposed matrix, in granules of one entry.
struct Turned {
  Tensor indices, values;
};
Turned turned(const SparseLinear& problem, const Tensor& indices, const Tensor& values, cudaStream_t stream) {
  using torch::stable::detail::from, torch::stable::detail::to;
  const Tensor keys = torch::stable::new_empty(values, {values.numel()}, ScalarType::Long);
  if (values.numel() == 0) return {keys, values};
  launch_one<Keys>({},
                   {indices_of(indices), address<int64_t>(keys), problem.limit(), problem.rows(),
                    Granule::of(problem.granule), Granule::of(problem.columns())},
                   stream);
  std::array<StableIValue, 4> sorted{from(keys), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", sorted.data(), TORCH_ABI_VERSION));
  const Tensor entries = to<Tensor>(sorted[0]), order = to<Tensor>(sorted[1]);
  std::array<StableIValue, 3> taken{from(values), from(int64_t{0}), from(order)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", taken.data(), TORCH_ABI_VERSION));
  return {entries, to<Tensor>(taken[0])};
}

struct Cuda {  // indices and adapters are not looked at: each access is guarded instead
  template <typename W, typename V, int kTokens>
  static void launch(const OverlayRow& row, cudaStream_t stream) {
    const int64_t blocks = row.row_blocks * ((row.tokens + kTokens - 1) / kTokens);
    if (blocks == 0) return;
    SHIRA_CHECK(blocks <= INT32_MAX, "shira: a product of ", blocks, " blocks is more than one CUDA launch takes");
    const auto kernel = overlay_kernel<W, V, kTokens>;
    SHIRA_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, stream, row);
  }

  static void run(const SparseLinear& problem, const Tensor& output, const Tensor& input, const Tensors& indices,
                  const Tensors& values, const Tensor* adapters, const Tensor* alphas) {
    SHIRA_CHECK(problem.features < INT32_MAX / kBlockRows, problem.op, ": input must have fewer than ",
                INT32_MAX / kBlockRows, " features, got ", problem.features);
    const Device device(input);
    std::vector<Turned> masks;  // owns what the launch reads
    std::vector<Delta> deltas;
    for (size_t k = 0; k < indices.size(); ++k) {
      masks.push_back(problem.transposed ? turned(problem, indices[k], values[k], device.stream)
                                         : Turned{indices[k], values[k]});
      const Tensor& own = masks.back().indices;
      deltas.push_back({address<const void>(masks.back().values), address<const void>(own), own.numel(),
                        own.scalar_type() == ScalarType::Long});
    }
    const int64_t granule = problem.transposed ? 1 : problem.granule;
    OverlayRow row{address<const void>(input),
                   address<void>(output),
                   adapters == nullptr ? nullptr : address<const int32_t>(*adapters),
                   alphas == nullptr ? nullptr : address<const void>(*alphas),
                   nullptr,
                   {},
                   static_cast<int64_t>(deltas.size()),
                   problem.tokens,
                   problem.features,
                   problem.out_features,
                   problem.features * problem.out_features / granule,
                   (problem.out_features + kBlockRows - 1) / kBlockRows,
                   Granule::of(granule)};
    Tensor room = input;
    if (deltas.size() <= kFew)
      std::copy(deltas.begin(), deltas.end(), row.few);
    else
      row.many = put(deltas, input, room, device.stream);
    with_dtypes(input.scalar_type(), values[0].scalar_type(), [&](auto w, auto v) {
      using W = typename decltype(w)::type;
      using V = typename decltype(v)::type;
      if (row.tokens >= kShare * row.count)
        launch<W, V, kShare>(row, device.stream);
      else
        launch<W, V, 1>(row, device.stream);
    });
  }

  static void multiply(const SparseLinear& problem, const Tensor& input, const Tensor& indices, const Tensor& values,
                       const Tensor& result) {
    if (result.numel() > 0) run(problem, result, input, {indices}, {values}, nullptr, nullptr);
  }
  static void add(const SparseLinear& problem, const Tensor& output, const Tensor& input, const Tensors& indices,
                  const Tensors& values, const Tensor& adapters, const Tensor& alphas) {
    run(problem, output, input, indices, values, &adapters, &alphas);
  }
};

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::OverlayOps<shira::cuda::Cuda>::implement(m);
}
