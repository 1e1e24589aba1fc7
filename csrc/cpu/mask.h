// A mask over the rows and columns of a matrix.
#pragma once
#include <algorithm>
#include <cstdint>

#include "vector.h"

namespace shira::cpu {

// The mask as entries of the flat result. A granule may span rows.
template <typename I>
struct Mask {
  const I* indices;
  int64_t n, granule, columns;

  // The first entry at or past the start of a row.
  int64_t row_start(int64_t row) const {
    const int64_t place = row * columns;
    const I* const found = std::partition_point(
        indices, indices + n, [=, this](const I& index) { return (int64_t{index} + 1) * granule <= place; });
    if (found == indices + n) return n * granule;
    return (found - indices) * granule + std::max<int64_t>(0, place - int64_t{*found} * granule);
  }

  // f(first entry, row, tile, entries) for the runs in entries [begin, end), by row; tiles have 2^log columns.
  template <typename F>
  void runs(int64_t begin, int64_t end, int log, F&& f) const {
    int64_t number = begin / granule, within = begin % granule, row = 0, row_end = 0;
    for (int64_t e = begin; e < end;) {
      const int64_t start = int64_t{indices[number]} * granule + within;
      if (start >= row_end) {
        row = start / columns;
        row_end = (row + 1) * columns;
      }
      const int64_t row_begin = row_end - columns, tile = (start - row_begin) >> log;
      const int64_t stop = std::min(row_end, row_begin + ((tile + 1) << log)), first = e;
      if (granule == 1) {
        while (++e < end && indices[e] < stop) {
        }
        number = e;
      } else {
        for (int64_t at = start; e < end && at < stop;) {
          const int64_t length = std::min({granule - within, end - e, stop - at});
          e += length;
          within += length;
          if (within < granule) break;
          within = 0;
          if (++number < n) at = int64_t{indices[number]} * granule;
        }
      }
      f(first, row, tile, e - first);
    }
  }
};

// The position of a loop in a mask. `single`: granules of one entry, which need less state.
template <typename I, bool single>
struct Walk {
  const I* indices;
  int64_t n, granule, columns;
  int64_t number, within;  // the granule, and the entry within it

  Walk(const Mask<I>& mask, int64_t entry)
      : indices(mask.indices),
        n(mask.n),
        granule(mask.granule),
        columns(mask.columns),
        number(entry / mask.granule),
        within(entry % mask.granule) {}

  // Moves to the next entry, or run of entries, of the row that starts at `start`; false at its end.
  SHIRA_INLINE bool next(int64_t start, int64_t& column, int64_t& length) {
    if (number == n) return false;
    if constexpr (single) {
      column = int64_t{indices[number]} - start;
      length = 1;
      if (column >= columns) return false;
      ++number;
      return true;
    } else {
      column = int64_t{indices[number]} * granule + within - start;
      if (column >= columns) return false;
      length = std::min(granule - within, columns - column);
      within += length;
      if (within == granule) {
        within = 0;
        ++number;
      }
      return true;
    }
  }
};

}  // namespace shira::cpu
