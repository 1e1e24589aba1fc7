// How kernels are started: the device, the stream, and a list of tensors as one launch.
//
// This is also the seam between real CUDA and tests/emul, which compiles the same sources as C++ and runs them on CPU
// tensors: the two differ only here, in memory.h and in tests/emul/cuda_emul.h.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "../checks.h"
#include "../core/hd.h"

#if defined(SHIRA_EMULATE)
#include "cuda_emul.h"                       // on the include path of the emulated build only
#define SHIRA_KEY CompositeExplicitAutograd  // CPU tensors, and those of other devices that an op must refuse

namespace shira::cuda {
struct DeviceGuard {
  explicit DeviceGuard(int32_t) { emul::forget(); }
};
inline cudaStream_t current_stream(int32_t) { return nullptr; }
}  // namespace shira::cuda

#else
#include <cuda_runtime.h>
#define SHIRA_KEY CUDA

// A kernel parameter too large for a copy per thread. The type comes last, since it may contain commas.
#define SHIRA_PARAMETER(name, ...) const __grid_constant__ __VA_ARGS__ name
#define SHIRA_SHARED(name, count, ...) __shared__ __VA_ARGS__ name[count]
#define SHIRA_LAUNCH(kernel, grid, block, stream, ...)     \
  do {                                                     \
    kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__); \
    SHIRA_CUDA_CHECK(cudaGetLastError());                  \
  } while (0)
// With as many bytes of shared memory as the host says, which a kernel names by SHIRA_SHARED_REST.
#define SHIRA_SHARED_REST(name, ...)                                 \
  extern __shared__ __align__(16) unsigned char shira_shared_rest[]; \
  __VA_ARGS__* const name = reinterpret_cast<__VA_ARGS__*>(shira_shared_rest)
#define SHIRA_LAUNCH_WITH(bytes, kernel, grid, block, stream, ...)                                          \
  do {                                                                                                      \
    SHIRA_CUDA_CHECK(cudaFuncSetAttribute((kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, (bytes))); \
    kernel<<<(grid), (block), (bytes), (stream)>>>(__VA_ARGS__);                                            \
    SHIRA_CUDA_CHECK(cudaGetLastError());                                                                   \
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

// The runtime keeps an error until it is read: one that is refused here must not show up after the next launch, whose
// kernel runs all the same.
#define SHIRA_CUDA_CHECK(call)                                                               \
  do {                                                                                       \
    const cudaError_t status = (call);                                                       \
    if (status != cudaSuccess) {                                                             \
      (void)cudaGetLastError();                                                              \
      ::shira::refuse("shira: CUDA reports ", cudaGetErrorString(status), " (", #call, ")"); \
    }                                                                                        \
  } while (0)

namespace shira::cuda {

constexpr int kThreads = 256;

// Makes the tensor's device the current one for as long as this object lives, and holds torch's current stream there.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : stream(current_stream(tensor.get_device_index())), guard_(tensor.get_device_index()) {}
  const cudaStream_t stream;

 private:
  DeviceGuard guard_;
};

// How much the current device has of something.
inline int device_has(cudaDeviceAttr what) {
  int device = 0, value = 0;
  SHIRA_CUDA_CHECK(cudaGetDevice(&device));
  SHIRA_CUDA_CHECK(cudaDeviceGetAttribute(&value, what, device));
  return value;
}

inline int64_t byte_size(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

// A tensor's address for a kernel. The emulator learns here what a kernel may touch: const T is read-only.
template <typename T>
inline T* address(const Tensor& tensor) {
#if defined(SHIRA_EMULATE)
  emul::allow(tensor.data_ptr(), byte_size(tensor), !std::is_const_v<T>);
#endif
  return static_cast<T*>(tensor.data_ptr());
}

// Copies from the device, after waiting for everything before it on the stream.
inline void fetch(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  SHIRA_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream));
  SHIRA_CUDA_CHECK(cudaStreamSynchronize(stream));
}

// ---- a list of tensors as one launch -------------------------------------------------------------------
//
// Work is cut into tiles, one per block, so it is balanced by entries and not by tensors. The tensors' pointers and
// sizes travel as a kernel parameter: nothing is copied to the device, and a captured graph holds all of it.

// The size limit of kernel parameters: 4 KB before CUDA 12.1. 32 KB hold 430 weights, 280 for switch_.
#if defined(SHIRA_EMULATE) || CUDART_VERSION >= 12010
constexpr int kParameterBytes = 32764;
#else
constexpr int kParameterBytes = 4096;
#endif

// `Work` has: struct Row, one tensor's pointers and sizes; struct Scalars, shared by the list; static int64_t
// tiles(const Row&); and static __device__ void tile(const Scalars&, const Row&, int64_t tile), run by a block of
// kThreads threads.
template <typename Work, int kRows>
struct Table {
  explicit Table(const typename Work::Scalars& scalars) : scalars(scalars) {}
  typename Work::Scalars scalars;
  int32_t rows;
  int32_t first[kRows];  // each row's first tile; apart from the rows, so that the search reads few cache lines
  typename Work::Row row[kRows];
};

// For sm_100 and sm_120, ptxas spills in a few kernels to fit more than two blocks per multiprocessor, though two are
// enough to hide latency: with a bound of two it does not. For sm_80 and sm_90 it spills only in Works that name a
// bound of their own; in the others a bound would cost blocks. 0 means no bound.
template <typename Work>
constexpr int named_blocks() {
  if constexpr (requires { Work::kLeastBlocks; }) return Work::kLeastBlocks;
  return 0;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kTwoBlocks = true;
#else
constexpr bool kTwoBlocks = false;
#endif
template <typename Work>
constexpr int kLeastBlocks = kTwoBlocks ? 2 : named_blocks<Work>();

template <typename Work, int kRows>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<Work>)
    list_kernel(SHIRA_PARAMETER(table, Table<Work, kRows>)) {
  const int32_t tile = static_cast<int32_t>(blockIdx.x);
  int found = 0;
  if constexpr (kRows > 1) {
    int end = table.rows;  // finds the last row whose first tile is not past this one
    while (end - found > 1) {
      const int middle = (found + end) / 2;
      if (table.first[middle] <= tile)
        found = middle;
      else
        end = middle;
    }
  }
  Work::tile(table.scalars, table.row[found], static_cast<int64_t>(tile - table.first[found]));
}

template <typename Work, int kRows>
void launch_table(const typename Work::Scalars& scalars, const std::vector<typename Work::Row>& rows,
                  cudaStream_t stream) {
  Table<Work, kRows> table(scalars);
  size_t next = 0;
  while (next < rows.size()) {
    int64_t tiles = 0;
    int32_t count = 0;
    for (; next < rows.size() && count < kRows; ++next) {
      const int64_t more = Work::tiles(rows[next]);
      if (more == 0) continue;
      SHIRA_CHECK(more <= INT32_MAX, "shira: a tensor of ", more, " tiles is more than one CUDA launch takes");
      if (tiles + more > INT32_MAX) break;
      table.first[count] = static_cast<int32_t>(tiles);
      table.row[count++] = rows[next];
      tiles += more;
    }
    if (count == 0) return;
    table.rows = count;
    const auto kernel = list_kernel<Work, kRows>;
    SHIRA_LAUNCH(kernel, static_cast<unsigned>(tiles), kThreads, stream, table);
  }
}

// One row has its own kernel: its parameter is small, and so a call takes little time on the host.
template <typename Work>
void launch_one(const typename Work::Scalars& scalars, const typename Work::Row& row, cudaStream_t stream) {
  launch_table<Work, 1>(scalars, {row}, stream);
}
template <typename Work>
void launch_list(const typename Work::Scalars& scalars, const std::vector<typename Work::Row>& rows,
                 cudaStream_t stream) {
  constexpr int kHeader = sizeof(typename Work::Scalars) + 16;
  constexpr int kMost = (kParameterBytes - kHeader) / static_cast<int>(sizeof(typename Work::Row) + sizeof(int32_t));
  static_assert(sizeof(Table<Work, kMost>) <= kParameterBytes);
  constexpr int kFewRows = 16;  // a layer's weights: sending 32 KB with them would take longer than the launch
  if (rows.size() == 1)
    launch_table<Work, 1>(scalars, rows, stream);
  else if (kFewRows < kMost && rows.size() <= kFewRows)
    launch_table<Work, std::min(kFewRows, kMost)>(scalars, rows, stream);
  else
    launch_table<Work, kMost>(scalars, rows, stream);
}

// Groups a list whose members need different kernels (dtypes, alignments) by kernel, so that a model of one dtype is
// one launch. `Launch` starts them and is compared as a pointer.
template <typename Row, typename Launch>
class Groups {
 public:
  void add(Launch launch, const Row& row) {
    for (auto& [with, rows] : groups_)
      if (with == launch) return rows.push_back(row);
    groups_.push_back({launch, {row}});
  }
  template <typename... Args>
  void launch(const Args&... args) {
    for (auto& [with, rows] : groups_) with(rows, args...);
  }

 private:
  std::vector<std::pair<Launch, std::vector<Row>>> groups_;
};

}  // namespace shira::cuda
