// sampled_grad on CUDA, in two ways. Both give the same bits on every run on one device and keep no dense gradient.
//
// Sampled: at the selected entries alone, the dot product of a column of grad_output and a column of input over the
// tokens. Tokens are the outer dimension of both, so columns are strided. Both are transposed first, a block of tokens
// at a time, so that a dot reads two contiguous runs, 16 bytes per access: the copies take (rows + columns) * kTokens
// entries, however many tokens there are. A warp computes kEntries entries side by side; most often they are neighbours
// in a row, and then its run of grad_output comes from L1. The order of a sum depends on the shapes alone.
//
// Dense: the matrix product that torch runs on tensor cores, with sums in float32, some rows at a time into a scratch
// buffer of 64 MB, from which the entries are taken. In float32 it follows torch's own setting of the product's
// precision, as a dense backward does.
#include <array>
#include <cmath>

#include "../core/arithmetic.h"
#include "../ops/gradient.h"
#include "block.h"

namespace shira::cuda {
namespace {

// The share of entries from which the dense way is taken, with many tokens and with few. Predicted for Hopper, not
// measured. On 16-bit entries, tensor cores multiply 7.5e14 / 2 pairs a second; a dot loads one entry of input per pair
// from L2, at 5.5 TB/s. They take equally long at 0.7 %, and below that the copies that transpose both take a third of
// the dense product's time. Float32 has a tenth of the rate and twice the bytes; float64 likewise. With few tokens, the
// dense way still writes its sums, which takes as long as multiplying `least` tokens; a dot finds its columns and adds
// up its lanes, which takes as long as reading `fixed` more. At 1 % of 16-bit entries, dense begins at 100 tokens.
struct Threshold {
  double share;
  int64_t least, fixed;

  bool dense(double selected, int64_t tokens) const {
    return selected * static_cast<double>(tokens + fixed) >= share * static_cast<double>(std::max(tokens, least));
  }
};
constexpr Threshold kNarrow{0.005, 500, 150}, kWide{0.02, 50, 75};
constexpr int64_t kScratch = int64_t{1} << 24;  // entries of the dense gradient that exist at a time
constexpr int64_t kRowBlock = 256;              // they are whole blocks of this many rows

constexpr int64_t kTokens = 4096;  // transposed at a time
constexpr int kEntries = 4;        // per warp

struct DotRow {
  const void* grad_output;  // [rows, tokens]
  const void* input;        // [columns, tokens]
  Indices indices;
  void* result;
  int64_t tokens, limit;
  Granule width;  // the weight's columns, to split an entry into row and column
  Granule granule;
  bool adds;  // to the sums of earlier blocks of tokens
};

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <typename W, int kWide>
struct Dot {
  using Row = DotRow;
  struct Scalars {};
  using C = typename W::Compute;
  using Run = Pack<typename W::Bits, kWide>;

  static int64_t tiles(const Row& row) {
    return (row.indices.count * row.granule.units + kWarps * kEntries - 1) / (kWarps * kEntries);
  }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int64_t total = row.indices.count * row.granule.units, first = (tile * kWarps + warp) * kEntries;
    const int64_t runs = row.tokens / kWide;
    int64_t left[kEntries], right[kEntries];  // the first run of each column, or -1 if there is nothing to do
    C sum[kEntries];
    if (first >= total) return;  // true for the whole warp
    int64_t item[kEntries], number[kEntries], offset[kEntries], index[kEntries], entry[kEntries], line[kEntries],
        column[kEntries];
#pragma unroll
    for (int e = 0; e < kEntries; ++e) item[e] = first + e < total ? first + e : total - 1;
    row.granule.split(item, total, number, offset);
    row.indices.all(number, index);
#pragma unroll
    for (int e = 0; e < kEntries; ++e)
      entry[e] = within(index[e], row.limit) ? index[e] * row.granule.units + offset[e] : 0;
    row.width.split(entry, row.limit * row.granule.units, line, column);
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const bool is = first + e < total && within(index[e], row.limit);
      left[e] = is ? line[e] * runs : -1;
      right[e] = is ? column[e] * runs : -1;
      sum[e] = 0;
    }
    for (int64_t at = lane; at < runs; at += 32) {
      Run a[kEntries], b[kEntries];
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        if (left[e] < 0) continue;
        a[e] = Run::cached(row.grad_output, left[e] + at);
        b[e] = Run::cached(row.input, right[e] + at);
      }
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        if (left[e] < 0) continue;
#pragma unroll
        for (int k = 0; k < kWide; ++k) sum[e] = multiply_add(W::load(a[e].entry[k]), W::load(b[e].entry[k]), sum[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum[e] += __shfl_xor_sync(kAllLanes, sum[e], lanes);
      if (lane != 0 || first + e >= total) continue;
      C* const result = static_cast<C*>(row.result) + first + e;  // an index out of range gives 0
      store_stream(result, row.adds ? load_stream(result) + sum[e] : sum[e]);
    }
  }
};

struct TakeRow {
  const void* dense;  // entries [begin, end) of the weight
  int64_t begin, end;
  Indices indices;
  void* result;
  int64_t limit;
  Granule granule;
  bool first;  // the first block of rows: it writes 0 for indices out of range
};

template <typename T>
struct Take {
  using Row = TakeRow;
  struct Scalars {};
  static constexpr int kItems = 4, kTile = kThreads * kItems;

  static int64_t tiles(const Row& row) { return (row.indices.count * row.granule.units + kTile - 1) / kTile; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    const int64_t total = row.indices.count * row.granule.units, begin = tile * kTile, end = begin + kTile;
    const Items<kItems> items(row.indices, row.granule, begin, end < total ? end : total);
    T taken[kItems];
    bool here[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const bool inside = within(items.index[k], row.limit);
      const int64_t entry = inside ? items.index[k] * row.granule.units + items.offset[k] : -1;
      const bool read = items.is(k) && entry >= row.begin && entry < row.end;
      here[k] = read || (items.is(k) && !inside && row.first);
      taken[k] = 0;
      if (read) taken[k] = load_weight(static_cast<const T*>(row.dense) + (entry - row.begin));
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      if (here[k]) store_stream(static_cast<T*>(row.result) + items.at(k), taken[k]);
  }
};

// torch's own product of two matrices, in the dtype of the sums. It uses the forms of mm that autocast leaves alone:
// the plain form would return another dtype under it.
Tensor product(const Tensor& left, const Tensor& right, ScalarType sums) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{};
  if (left.scalar_type() == sums) {
    const Tensor out = torch::stable::new_empty(left, {left.size(0), right.size(1)});
    stack = {from(left), from(right), from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  } else if (left.is_cuda()) {
    stack = {from(left), from(right), from(sums)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  } else {  // emulated: torch has the form above on CUDA only
    return product(torch::stable::to(left, sums), torch::stable::to(right, sums), sums);
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

enum class Way { Faster, Sampled, Dense };

template <Way way>
struct Cuda {
  static void content(const char*, Name, const Tensor&, int64_t) {}  // each access is guarded instead

  // Tokens [begin, begin + n) of a tensor with `columns` columns, transposed.
  static Tensor turned(const Tensor& tensor, int64_t tokens, int64_t columns, int64_t begin, int64_t n) {
    Tensor rows = torch::stable::view(tensor, {tokens, columns});
    rows = torch::stable::narrow(rows, 0, begin, n);
    return torch::stable::contiguous(torch::stable::transpose(rows, 0, 1));
  }

  template <typename W>
  static void dots(const DotRow& row, const Device& device) {
    constexpr int kBytes = sizeof(typename W::Bits), kWide = 16 / kBytes;
    if (widest_unit(row.tokens * kBytes, row.grad_output, row.input) == 16)
      launch_one<Dot<W, kWide>>({}, row, device.stream);
    else
      launch_one<Dot<W, 1>>({}, row, device.stream);
  }

  static void dense(const SampledGrad& problem, const Tensor& grad_output, const Tensor& input, const Tensor& indices,
                    const Tensor& result) {
    const Device device(grad_output);
    const Tensor left =
        torch::stable::transpose(torch::stable::view(grad_output, {problem.tokens, problem.rows}), 0, 1);
    const Tensor right = torch::stable::view(input, {problem.tokens, problem.columns});
    // Whole blocks of rows: each part's first column of grad_output is then as aligned as the tensor itself, and cuBLAS
    // uses its fast kernels only at multiples of 16 bytes.
    const int64_t fit = kScratch / std::max<int64_t>(1, problem.columns);
    const int64_t most = std::max(kRowBlock, fit / kRowBlock * kRowBlock);
    for (int64_t row = 0; row == 0 || row < problem.rows; row += most) {
      Tensor own = left;
      const int64_t n = std::min(most, problem.rows - row);
      own = torch::stable::narrow(own, 0, row, n);
      const Tensor part = product(own, right, result.scalar_type());
      const TakeRow take{address<const void>(part),    row * problem.columns,
                         (row + n) * problem.columns,  indices_of(indices),
                         address<void>(result),        problem.rows * problem.columns / problem.granule,
                         Granule::of(problem.granule), row == 0};
      if (result.scalar_type() == ScalarType::Double)
        launch_one<Take<uint64_t>>({}, take, device.stream);
      else
        launch_one<Take<uint32_t>>({}, take, device.stream);
    }
  }

  static void sampled(const SampledGrad& problem, const Tensor& grad_output, const Tensor& input, const Tensor& indices,
                      const Tensor& result) {
    const double share = static_cast<double>(result.numel()) / static_cast<double>(problem.rows * problem.columns);
    const bool narrow = input.scalar_type() != result.scalar_type();
    if (way == Way::Dense || (way == Way::Faster && (narrow ? kNarrow : kWide).dense(share, problem.tokens)))
      return dense(problem, grad_output, input, indices, result);
    const Device device(grad_output);
    for (int64_t begin = 0; begin == 0 || begin < problem.tokens; begin += kTokens) {
      const int64_t n = std::min(kTokens, problem.tokens - begin);
      const Tensor left = turned(grad_output, problem.tokens, problem.rows, begin, n);
      const Tensor right = turned(input, problem.tokens, problem.columns, begin, n);
      const DotRow row{address<const void>(left),
                       address<const void>(right),
                       indices_of(indices),
                       address<void>(result),
                       n,
                       problem.rows * problem.columns / problem.granule,
                       Granule::of(problem.columns),
                       Granule::of(problem.granule),
                       begin > 0};
      switch (grad_output.scalar_type()) {
        case ScalarType::Half: dots<core::Float16>(row, device); break;
        case ScalarType::BFloat16: dots<core::BFloat16>(row, device); break;
        case ScalarType::Float: dots<core::Float32>(row, device); break;
        default: dots<core::Float64>(row, device); break;
      }
    }
  }
};

// For the tests: the given way. Otherwise the density and the number of tokens decide.
Tensor sampled_grad_by(const Tensor& grad_output, const Tensor& input, const Tensor& indices, int64_t granule,
                       std::string name) {
  const bool sampled = name == "sampled";
  SHIRA_CHECK(sampled || name == "dense", "_sampled_grad: how must be sampled or dense, got ", name);
  const auto op = sampled ? GradientOps<Cuda<Way::Sampled>>::sampled_grad : GradientOps<Cuda<Way::Dense>>::sampled_grad;
  return op(grad_output, input, indices, granule);
}

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) {
  if (shira::backend_skips_cuda()) return;
  shira::GradientOps<shira::cuda::Cuda<shira::cuda::Way::Faster>>::implement(m);
  m.impl("_sampled_grad", TORCH_BOX(&shira::cuda::sampled_grad_by));
}
