// Checks the content of `indices`, for the ops that must look at it: those may synchronise.
#pragma once
#include "memory.h"

namespace shira::cuda {

struct CheckRow {
  Indices indices;
  int64_t limit;
  unsigned long long* first;  // the first position that is refused
};

struct Check {
  using Row = CheckRow;
  struct Scalars {};
  static constexpr int kItems = 4, kTile = kThreads * kItems;
  static int64_t tiles(const Row& row) { return (row.indices.count + kTile - 1) / kTile; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    // Each index and the one before it; the loads of all items are in flight at once.
    int64_t at[kItems], before[kItems], index[kItems], previous[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t i = tile * kTile + k * kThreads + threadIdx.x, last = row.indices.count - 1;
      at[k] = i < last ? i : last;
      before[k] = at[k] > 0 ? at[k] - 1 : 0;
    }
    row.indices.all(at, index);
    row.indices.all(before, previous);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const bool inside = row.limit == kNoLimit ? index[k] >= 0 : within(index[k], row.limit);
      if (!inside || (at[k] > 0 && index[k] <= previous[k]))
        atomicMin(row.first, static_cast<unsigned long long>(at[k]));
    }
  }
};

// Refuses indices that are not strictly increasing in [0, limit); kNoLimit leaves only the lower bound.
inline void check_content(const char* op, Name name, const Tensor& indices, int64_t limit, cudaStream_t stream) {
  if (indices.numel() == 0) return;
  const Tensor found = torch::stable::new_empty(indices, {1}, ScalarType::Long);
  auto* first = address<unsigned long long>(found);
  unsigned long long at;
  SHIRA_CUDA_CHECK(cudaMemsetAsync(first, 0xFF, sizeof(at), stream));
  launch_one<Check>({}, {indices_of(indices), limit, first}, stream);
  fetch(&at, first, sizeof(at), stream);
  if (at == ~0ull) return;
  const int64_t size = static_cast<int64_t>(indices.element_size()), n = at == 0 ? 1 : 2;
  const char* entries = static_cast<const char*>(indices.data_ptr()) + (static_cast<int64_t>(at) + 1 - n) * size;
  int64_t wide[2];
  fetch(wide, entries, n * size, stream);
  if (size == 4) {
    int32_t narrow[2];
    memcpy(narrow, wide, sizeof(narrow));
    std::copy(narrow, narrow + n, wide);
  }
  refuse_entry(op, name, wide[n - 1], wide[0], static_cast<int64_t>(at), limit);
}

}  // namespace shira::cuda
