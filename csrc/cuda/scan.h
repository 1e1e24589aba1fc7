// From the counts of a launch's tiles to where each tile's share begins.
#pragma once
#include "block.h"

namespace shira::cuda {

struct ScanRow {
  uint64_t* counts;  // n of them; then what was before each, and the total behind them
  int64_t n;
};

// One block: there is a count for a thousand entries or more, and each is read and written once.
struct Scan {
  using Row = ScanRow;
  struct Scalars {};
  static int64_t tiles(const Row&) { return 1; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    uint64_t before = 0;
    for (int64_t begin = 0; begin < row.n; begin += kThreads) {
      const int64_t at = begin + threadIdx.x;
      uint64_t total;
      const uint64_t count = at < row.n ? load_stream(row.counts + at) : 0;
      const uint64_t own = before + block_scan(count, total, Plain{});
      if (at < row.n) store_stream(row.counts + at, own);
      before += total;
    }
    if (threadIdx.x == 0) store_stream(row.counts + row.n, before);
  }
};

}  // namespace shira::cuda
