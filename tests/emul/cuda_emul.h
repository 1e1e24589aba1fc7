// Runs CUDA kernels on the CPU, so that their logic is tested where there is no GPU: the .cu files, host code included,
// are compiled as C++.
//
// A block's threads are fibers that run in turn, each from one barrier or warp operation to the next; blocks run in
// turn too. set_order() sets the order of both: forward, reverse, or shuffled by a seed. So a missing barrier shows as
// a result that depends on the order. These are errors, with a message:
//   - an access outside the tensors that the host code took an address() of, a write to one that it took as const, and
//     an access that is not aligned to its size
//   - a barrier or warp operation that some of its threads never reach, or reach with other masks
//   - shared memory beyond 48 KB, or beyond what the device has for the part that a launch asks for, and a write past
//     the end of a shared array
//   - while capturing: a copy from or to the host, and waiting for a stream
// Shared memory is filled with 0xCD before a block runs. A build with SHIRA_SANITIZE=thread also finds races that no
// order shows (races.cpp). What only parallel threads do cannot be seen here: the ordering of memory between blocks, or
// how fast anything is.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>

// ---- the language ------------------------------------------------------------------------------------------
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#define SHIRA_PARAMETER(name, ...) const __VA_ARGS__& name
#define SHIRA_SHARED(name, count, ...) \
  static char name##_site;             \
  __VA_ARGS__* const name = ::shira::emul::shared<__VA_ARGS__>(&name##_site, count)
#define SHIRA_SHARED_REST(name, ...) __VA_ARGS__* const name = static_cast<__VA_ARGS__*>(::shira::emul::shared_rest())
#define SHIRA_LAUNCH(kernel, grid, block, stream, ...) SHIRA_LAUNCH_WITH(0, kernel, grid, block, stream, __VA_ARGS__)
#define SHIRA_LAUNCH_WITH(bytes, kernel, grid, block, stream, ...)                 \
  do {                                                                             \
    ::shira::emul::launch((grid), (block), (bytes), [&] { kernel(__VA_ARGS__); }); \
    SHIRA_CUDA_CHECK(cudaGetLastError());                                          \
  } while (0)

// ---- the runtime's few functions ---------------------------------------------------------------------------
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorStreamCaptureUnsupported };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice };
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "operation not permitted when stream is capturing";
}
namespace shira::emul {
extern int64_t most_shared;                  // bytes of shared memory that a launch may ask for
extern bool capturing;                       // whether a graph is captured; what it cannot hold is an error
extern thread_local cudaError_t last_error;  // of any call, until it is read
inline cudaError_t unless_capturing() {
  if (capturing) last_error = cudaErrorStreamCaptureUnsupported;
  return capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
}  // namespace shira::emul
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  *value = what == cudaDevAttrMultiProcessorCount ? 3 : static_cast<int>(shira::emul::most_shared);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(shira::emul::last_error, cudaSuccess); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return shira::emul::unless_capturing(); }
// All host memory counts as pageable.
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (kind != cudaMemcpyDeviceToDevice && shira::emul::unless_capturing() != cudaSuccess)
    return cudaErrorStreamCaptureUnsupported;
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

namespace shira::emul {

// What the threads see; one launch runs at a time.
struct Thread {
  Dim3 index;
  int lane = 0;
  uint64_t sent = 0;                   // by this lane, to a warp operation
  const uint64_t* received = nullptr;  // by each lane of its warp
  uint32_t mask = 0, arrived = 0;      // the lanes asked for, and those that took part in the last operation
};
struct Grid {
  Thread* current = nullptr;
  Dim3 block, block_size, grid_size;
  bool relaxed = false;  // the thread accesses memory as atomics and volatile do
};
extern Grid grid;

// 0: forward, 1: reverse, else shuffled by this seed.
void set_order(int64_t order);
void set_capturing(bool on);
void set_most_shared(int64_t bytes);  // 0: as on an H100
int64_t launches();                   // so far
void launch(unsigned blocks, unsigned threads, size_t shared_rest, const std::function<void()>& kernel);

// Memory that kernels may touch from now on, until forget() (at the start of every op).
void allow(const void* memory, int64_t bytes, bool writable);
void forget();
void check_access(const void* p, size_t bytes, bool writes);

// The search for races (races.cpp), in builds that have one: every launch, block and part between two barriers is told.
void watch(bool on);
void begin_launch();
void begin_block();
void begin_step();
enum class Memory { Own, Shared, Global };  // Own: of the thread, or of the host
Memory memory_of(const void* p, size_t bytes);
void fail_later(const std::string& text);  // once the thread that runs now has come to its next barrier or its end

void* shared_rest();
void* shared_bytes(const void* site, size_t bytes);
template <typename T>
inline T* shared(const void* site, size_t count) {
  return static_cast<T*>(shared_bytes(site, sizeof(T) * count));
}

template <typename T>
inline T load(const T* p) {
  check_access(p, sizeof(T), false);
  return *p;
}
template <typename T>
inline void store(T* p, const T& value) {
  check_access(p, sizeof(T), true);
  *p = value;
}

struct Relaxed {
  Relaxed() { set(true); }
  ~Relaxed() { set(false); }
  static void set(bool relaxed) {  // the compiler does not know that its own calls at an access look
    asm volatile("" ::: "memory");
    grid.relaxed = relaxed;
    asm volatile("" ::: "memory");
  }
};
template <typename T>
inline T load_relaxed(const T* p) {
  const Relaxed relaxed;
  return load(p);
}
template <typename T>
inline void store_relaxed(T* p, const T& value) {
  const Relaxed relaxed;
  store(p, value);
}

void wait_for_block();
void wait_for_warp(const char* what, uint32_t mask);  // `sent` of every lane in `mask` is `received` afterwards

template <typename T>
inline T exchange(const char* what, uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  Thread* me = grid.current;
  me->sent = 0;
  std::memcpy(&me->sent, &value, sizeof(T));
  wait_for_warp(what, mask);
  if (source >= 0 && source < 32 && (mask >> source & 1)) std::memcpy(&value, &me->received[source], sizeof(T));
  return value;
}
inline uint32_t ballot(const char* what, uint32_t mask, bool predicate) {
  Thread* me = grid.current;
  me->sent = predicate;
  wait_for_warp(what, mask);
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) result |= static_cast<uint32_t>(me->received[lane]) << lane;
  return result;
}

template <typename T, typename F>
inline T atomic(T* p, const F& f) {
  check_access(p, sizeof(T), true);
  const Relaxed relaxed;
  const T before = *p;
  *p = f(before);
  return before;
}
}  // namespace shira::emul

#define threadIdx (::shira::emul::grid.current->index)
#define blockIdx (::shira::emul::grid.block)
#define blockDim (::shira::emul::grid.block_size)
#define gridDim (::shira::emul::grid.grid_size)

// ---- barriers, warp operations, atomics ----------------------------------------------------------------------
inline void __syncthreads() { shira::emul::wait_for_block(); }
inline void __threadfence() {}
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { shira::emul::wait_for_warp("__syncwarp", mask); }
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  return shira::emul::ballot("__ballot_sync", mask, predicate);
}
inline bool __any_sync(uint32_t mask, bool predicate) {
  return shira::emul::ballot("__any_sync", mask, predicate) != 0;
}
inline bool __all_sync(uint32_t mask, bool predicate) {
  return shira::emul::ballot("__all_sync", mask, predicate) == mask;
}
template <typename T>
inline T __shfl_sync(uint32_t mask, T value, int source) {
  return shira::emul::exchange("__shfl_sync", mask, value, source % 32);
}
template <typename T>
inline T __shfl_up_sync(uint32_t mask, T value, int delta) {
  return shira::emul::exchange("__shfl_up_sync", mask, value, shira::emul::grid.current->lane - delta);
}
template <typename T>
inline T __shfl_down_sync(uint32_t mask, T value, int delta) {
  return shira::emul::exchange("__shfl_down_sync", mask, value, shira::emul::grid.current->lane + delta);
}
template <typename T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return shira::emul::exchange("__shfl_xor_sync", mask, value, shira::emul::grid.current->lane ^ lanes);
}

template <typename T>
inline T atomicAdd(T* p, std::type_identity_t<T> x) {
  return shira::emul::atomic(p, [x](T old) { return static_cast<T>(old + x); });
}
template <typename T>
inline T atomicMin(T* p, std::type_identity_t<T> x) {
  return shira::emul::atomic(p, [x](T old) { return x < old ? x : old; });
}
template <typename T>
inline T atomicMax(T* p, std::type_identity_t<T> x) {
  return shira::emul::atomic(p, [x](T old) { return x > old ? x : old; });
}
template <typename T>
inline T atomicOr(T* p, std::type_identity_t<T> x) {
  return shira::emul::atomic(p, [x](T old) { return old | x; });
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffs(int32_t x) { return __builtin_ffs(x); }
inline int __clz(int32_t x) { return x == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(x)); }
inline int __clzll(int64_t x) { return x == 0 ? 64 : __builtin_clzll(static_cast<uint64_t>(x)); }
