// Sums over the threads of a block. All kThreads threads must call them.
#pragma once
#include "memory.h"

namespace shira::cuda {

constexpr int kWarps = kThreads / 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// The sum over the block, in thread 0. It is mod 2^64, so the order of the threads does not matter.
__device__ __forceinline__ uint64_t block_sum(uint64_t x) {
  SHIRA_SHARED(sums, kWarps, uint64_t);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  __syncthreads();  // an earlier call's sums may still be read
  if (thread % 32 == 0) sums[thread / 32] = x;
  __syncthreads();
  if (thread == 0)
    for (int warp = 1; warp < kWarps; ++warp) x += sums[warp];
  return x;
}

struct Plain {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};

// The sum over the threads before this one; `total` is that over all. `add` is associative, with 0 as its zero.
template <typename Add>
__device__ __forceinline__ uint64_t block_scan(uint64_t x, uint64_t& total, const Add& add) {
  SHIRA_SHARED(sums, kWarps, uint64_t);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  uint64_t sum = x;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t before = __shfl_up_sync(kAllLanes, sum, lanes);
    if (lane >= lanes) sum = add(before, sum);
  }
  __syncthreads();  // an earlier call's sums may still be read
  if (lane == 31) sums[thread / 32] = sum;
  __syncthreads();
  uint64_t before = 0;
  total = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp == thread / 32) before = total;
    total = add(total, sums[warp]);
  }
  const uint64_t left = __shfl_up_sync(kAllLanes, sum, 1);
  return lane == 0 ? before : add(before, left);
}

}  // namespace shira::cuda
