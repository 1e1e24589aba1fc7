// How kernels are started: the stream, the device, and a list of tensors as one launch.
//
// This is also the seam between real CUDA and tests/emul, which compiles the same sources as C++ and runs them on
// CPU tensors: what differs between the two stands here and in tests/emul/cuda_emul.h alone.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../checks.h"
#include "../core/hd.h"

#if defined(SHIRA_EMULATE)
#include "cuda_emul.h"  // on the include path of the emulated build only
#define SHIRA_LIB shira_emul
#define SHIRA_KEY CPU

namespace shira::cuda {
inline cudaStream_t current_stream(int32_t) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
}  // namespace shira::cuda

#else
#include <cuda_runtime.h>
#define SHIRA_LIB shira
#define SHIRA_KEY CUDA

// A parameter of a kernel that is too large to copy a thread.
#define SHIRA_PARAMETER(T, name) const __grid_constant__ T name
#define SHIRA_SHARED(T, name, count) __shared__ T name[count]
#define SHIRA_LAUNCH(kernel, grid, block, stream, ...)     \
  do {                                                     \
    kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__); \
    SHIRA_CUDA_CHECK(cudaGetLastError());                  \
  } while (0)

// Exported by libtorch_cuda only. Weak: null under a CPU-only torch, so that one .so loads everywhere; under a
// CUDA torch libtorch.so pulls it in.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace shira::cuda {
using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(int32_t device) {
  SHIRA_CHECK(&aoti_torch_get_current_cuda_stream != nullptr,
              "shira: a CUDA op was called, and the torch that is loaded has no CUDA");
  void* stream = nullptr;
  SHIRA_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
              "shira: torch did not give its current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}
}  // namespace shira::cuda
#endif

#define SHIRA_CUDA_CHECK(call)                                                                                \
  do {                                                                                                        \
    const cudaError_t status = (call);                                                                        \
    SHIRA_CHECK(status == cudaSuccess, "shira: CUDA reports ", cudaGetErrorString(status), " (", #call, ")"); \
  } while (0)

namespace shira::cuda {

constexpr int kThreads = 256;

// ---- a list of tensors as one launch -------------------------------------------------------------------
//
// Work is cut into tiles, one a block, so it is balanced by entries and not by tensors. The tensors' pointers and
// sizes travel as a kernel parameter: nothing is copied to the device, and a captured graph holds all of it.

// What a kernel may take: 4 KB before CUDA 12.1.
#if defined(SHIRA_EMULATE) || CUDART_VERSION >= 12010
constexpr int kParameterBytes = 32764;
#else
constexpr int kParameterBytes = 4096;
#endif

// `Work` has: struct Row, one tensor's pointers and sizes, with `first`, the number of its first tile, set here;
// struct Scalars, shared by the list; static int64_t tiles(const Row&), at least 1 for a row that is given; and
// static __device__ void tile(const Scalars&, const Row&, int64_t tile), run by a block of kThreads threads.
template <typename Work, int kRows>
struct Table {
  typename Work::Scalars scalars;
  int32_t rows;
  typename Work::Row row[kRows];
};

template <typename Work, int kRows>
__global__ void __launch_bounds__(kThreads) list_kernel(SHIRA_PARAMETER((Table<Work, kRows>), table)) {
  const int64_t tile = blockIdx.x;
  int found = 0;
  if constexpr (kRows > 1) {
    int end = table.rows;  // the last row whose first tile is not past this one
    while (end - found > 1) {
      const int middle = (found + end) / 2;
      if (table.row[middle].first <= tile)
        found = middle;
      else
        end = middle;
    }
  }
  const typename Work::Row& row = table.row[found];
  Work::tile(table.scalars, row, tile - row.first);
}

template <typename Work, int kRows>
void launch_table(const typename Work::Scalars& scalars, typename Work::Row* rows, size_t count, cudaStream_t stream) {
  Table<Work, kRows> table;
  table.scalars = scalars;
  for (size_t begin = 0; begin < count; begin += kRows) {
    const size_t end = std::min(count, begin + kRows);
    int64_t tiles = 0;
    for (size_t r = begin; r < end; ++r) {
      rows[r].first = tiles;
      tiles += Work::tiles(rows[r]);
      table.row[r - begin] = rows[r];
    }
    table.rows = static_cast<int32_t>(end - begin);
    SHIRA_CHECK(tiles <= INT32_MAX, "shira: a call over ", tiles, " tiles is more than one CUDA launch takes");
    const auto kernel = list_kernel<Work, kRows>;
    SHIRA_LAUNCH(kernel, static_cast<unsigned>(tiles), kThreads, stream, table);
  }
}

// One row has a kernel of its own: its parameter is small, and so is the time a call takes on the host.
template <typename Work>
void launch_list(const typename Work::Scalars& scalars, std::vector<typename Work::Row>& rows, cudaStream_t stream) {
  constexpr int kHeader = sizeof(Table<Work, 1>) - sizeof(typename Work::Row);
  constexpr int kMost = (kParameterBytes - kHeader) / static_cast<int>(sizeof(typename Work::Row));
  if (rows.size() == 1)
    launch_table<Work, 1>(scalars, rows.data(), 1, stream);
  else if (!rows.empty())
    launch_table<Work, kMost>(scalars, rows.data(), rows.size(), stream);
}

}  // namespace shira::cuda
