// Turns the counts of a launch's tiles into where each tile's output begins.
#pragma once
#include "block.h"

namespace shira::cuda {

struct ScanRow {
  uint64_t* counts;  // n of them; after the scan, the sum before each, and the total behind them
  int64_t n;
};

// One block per list: there is one count for a thousand entries or more, and each is read and written once. A thread
// has several, since every step waits for memory and for the block.
struct Scan {
  using Row = ScanRow;
  struct Scalars {};
  static constexpr int kItems = 8;
  static int64_t tiles(const Row&) { return 1; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    uint64_t before = 0;
    for (int64_t begin = 0; begin < row.n; begin += kThreads * kItems) {
      const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kItems;
      uint64_t count[kItems], sum = 0, total;
#pragma unroll
      for (int k = 0; k < kItems; ++k) sum += count[k] = first + k < row.n ? load_stream(row.counts + first + k) : 0;
      uint64_t own = before + block_scan(sum, total, Plain{});
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (first + k < row.n) store_stream(row.counts + first + k, own);
        own += count[k];
      }
      before += total;
    }
    if (threadIdx.x == 0) store_stream(row.counts + row.n, before);
  }
};

}  // namespace shira::cuda
