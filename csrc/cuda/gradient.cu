// sampled_grad on CUDA: the dot of a column of grad_output and a column of input over the tokens, at the selected
// entries alone.
//
// Tokens are the outer dimension of both, so columns are strided. Both are turned first, a block of tokens at a time,
// so that a dot reads two contiguous runs, in accesses of 16 bytes: the copies take (rows + columns) * kTokens entries,
// however many tokens there are, and no dense gradient exists. A warp has kEntries entries side by side; they are
// neighbours in a row more often than not, and then its run of grad_output comes from L1. The order of a sum depends
// on the shapes alone.
#include <cmath>

#include "../core/arithmetic.h"
#include "../gradient_ops.h"
#include "block.h"

namespace shira::cuda {
namespace {

constexpr int64_t kTokens = 4096;  // turned at a time
constexpr int kEntries = 4;        // of a warp

struct DotRow {
  const void* grad_output;  // [rows, tokens]
  const void* input;        // [columns, tokens]
  Indices indices;
  void* result;
  int64_t tokens, columns, limit;
  Granule granule;
  bool adds;  // to what an earlier block of tokens gave
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
    int64_t left[kEntries], right[kEntries];  // the first run of each column, or below 0: nothing to do
    C sum[kEntries];
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      left[e] = right[e] = -1;
      sum[e] = 0;
      if (first + e >= total) continue;
      int64_t number, offset;
      row.granule.split(first + e, number, offset);
      const int64_t index = row.indices[number];
      if (!within(index, row.limit)) continue;
      const int64_t entry = index * row.granule.units + offset;
      left[e] = entry / row.columns * runs;
      right[e] = entry % row.columns * runs;
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

struct Cuda {
  static void content(const char*, Name, const Tensor&, int64_t) {}  // guarded where it is used

  // Tokens [begin, begin + n) of a tensor of `columns`, turned.
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

  static void sampled(const SampledGrad& problem, const Tensor& grad_output, const Tensor& input, const Tensor& indices,
                      const Tensor& result) {
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
                       problem.columns,
                       problem.rows * problem.columns / problem.granule,
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

}  // namespace
}  // namespace shira::cuda

STABLE_TORCH_LIBRARY_IMPL(SHIRA_LIB, SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::GradientOps<shira::cuda::Cuda>::implement(m);
}
