// A table on the device whose lines are kernel parameters, not a copy from the host: a captured graph holds them.
#pragma once
#include "launch.h"
#include "memory.h"

namespace shira::cuda {

// T is trivially copyable, and its size is a multiple of 8 bytes.
template <typename T, int kLines>
struct PutRow {
  T* table;
  T lines[kLines];
  int32_t count;
};

template <typename T, int kLines>
struct Put {
  using Row = PutRow<T, kLines>;
  struct Scalars {};
  static constexpr int kWords = sizeof(T) / sizeof(uint64_t);
  static_assert(sizeof(T) % sizeof(uint64_t) == 0 && kLines * kWords <= kThreads);
  static int64_t tiles(const Row&) { return 1; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= row.count * kWords) return;
    store_stream(reinterpret_cast<uint64_t*>(row.table) + thread, reinterpret_cast<const uint64_t*>(row.lines)[thread]);
  }
};

// The table, in memory that `room` owns.
template <typename T>
const T* put(const std::vector<T>& lines, const Tensor& like, Tensor& room, cudaStream_t stream) {
  constexpr int kLines = kThreads / static_cast<int>(sizeof(T) / sizeof(uint64_t));
  room = torch::stable::new_empty(like, {static_cast<int64_t>(lines.size() * sizeof(T) / 8)}, ScalarType::Long);
  auto* const table = address<T>(room);
  std::vector<PutRow<T, kLines>> rows;
  for (size_t begin = 0; begin < lines.size(); begin += kLines) {
    PutRow<T, kLines> row{table + begin, {}, static_cast<int32_t>(std::min<size_t>(kLines, lines.size() - begin))};
    std::copy_n(lines.begin() + static_cast<int64_t>(begin), row.count, row.lines);
    rows.push_back(row);
  }
  launch_list<Put<T, kLines>>({}, rows, stream);
  return table;
}

}  // namespace shira::cuda
