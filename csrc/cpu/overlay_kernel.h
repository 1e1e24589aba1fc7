// The loops of the overlay family. Included once for each vector width, in its namespace: Floats and Doubles are the
// registers of that width, and SHIRA_TARGET lets the compiler use its instructions.
//
// With packed tokens a lane is a token: an output is one sum over its entries in the mask's order, whatever the other
// tokens are, and however many registers lie side by side. `row_sums` makes the same sums for one token.
#include "pack_kernel.h"

// sums[r] = the sums of row `first + r`, in kSide registers of tokens; x has as many per column.
template <typename Registers, int kSide, typename I, bool single>
SHIRA_TARGET void rows(Walk<I, single> walk, int64_t first, int64_t count, const typename Registers::Value* values,
                       const typename Registers::Value* x, typename Registers::Value* sums) {
  constexpr int64_t kDepth = kSide * Registers::kLanes;
  for (int64_t row = first; row < first + count; ++row, sums += kDepth) {
    typename Registers::Register sum[kSide];
    for (int side = 0; side < kSide; ++side) sum[side] = Registers::zero();
    int64_t column, length;
    while (walk.next(row * walk.columns, column, length)) {
      const auto* from = x + column * kDepth;
      for (int64_t k = 0; k < length; ++k, from += kDepth) {
        const auto value = Registers::broadcast(*values++);
        for (int side = 0; side < kSide; ++side)
          sum[side] = Registers::multiply_add(value, Registers::load(from + side * Registers::kLanes), sum[side]);
      }
    }
    for (int side = 0; side < kSide; ++side) Registers::store(sums + side * Registers::kLanes, sum[side]);
  }
}

// `rows` for granules that lie side by side in a row, taken column by column: those of one column need the same packed
// columns, which then stay in L1 and are loaded once for several rows. The results are added to sums[row]; earlier
// columns come first, so each sum is made in the same order as in `rows`.
template <typename Registers, int kSide, int kTall>
SHIRA_TARGET void column_of(const Placed* placed, int64_t count, int64_t granule,
                            const typename Registers::Value* values, const typename Registers::Value* x,
                            typename Registers::Value* sums) {
  constexpr int64_t kDepth = kSide * Registers::kLanes;
  for (; count >= kTall; count -= kTall, placed += kTall) {
    typename Registers::Register sum[kTall][kSide];
    const typename Registers::Value* own[kTall];
    for (int k = 0; k < kTall; ++k) {
      own[k] = values + placed[k].number * granule;
      for (int side = 0; side < kSide; ++side)
        sum[k][side] = Registers::load(sums + placed[k].row * kDepth + side * Registers::kLanes);
    }
    for (int k = 0; k < kTall; ++k) {  // of several lines each, only the first: the others follow by themselves
      __builtin_prefetch(values + placed[kAhead + k].number * granule);
      for (int side = 0; side < kSide; ++side)
        __builtin_prefetch(sums + placed[kAhead + k].row * kDepth + side * Registers::kLanes);
    }
    for (int64_t j = 0; j < granule; ++j) {
      typename Registers::Register numbers[kSide];
      for (int side = 0; side < kSide; ++side)
        numbers[side] = Registers::load(x + j * kDepth + side * Registers::kLanes);
      for (int k = 0; k < kTall; ++k) {
        const auto value = Registers::broadcast(own[k][j]);
        for (int side = 0; side < kSide; ++side)
          sum[k][side] = Registers::multiply_add(value, numbers[side], sum[k][side]);
      }
    }
    for (int k = 0; k < kTall; ++k)
      for (int side = 0; side < kSide; ++side)
        Registers::store(sums + placed[k].row * kDepth + side * Registers::kLanes, sum[k][side]);
  }
  if constexpr (kTall > 1)
    if (count > 0) column_of<Registers, kSide, kTall / 2>(placed, count, granule, values, x, sums);
}

template <typename Registers, int kSide>
SHIRA_TARGET void columns(const Placed* placed, const int64_t* starts, int64_t count, int64_t granule,
                          const typename Registers::Value* values, const typename Registers::Value* x,
                          typename Registers::Value* sums) {
  for (int64_t column = 0; column < count; ++column, x += granule * kSide * Registers::kLanes)
    column_of<Registers, kSide, Registers::kSums / kSide>(placed + starts[column], starts[column + 1] - starts[column],
                                                          granule, values, x, sums);
}

// `rows` transposed: x has the rows from `first` on; `sums` has all columns, and is added to.
template <typename Registers, int kSide, typename I, bool single>
SHIRA_TARGET void spread(Walk<I, single> walk, int64_t first, int64_t count, const typename Registers::Value* values,
                         const typename Registers::Value* x, typename Registers::Value* sums) {
  constexpr int64_t kDepth = kSide * Registers::kLanes;
  for (int64_t row = first; row < first + count; ++row, x += kDepth) {
    typename Registers::Register own[kSide];
    for (int side = 0; side < kSide; ++side) own[side] = Registers::load(x + side * Registers::kLanes);
    int64_t column, length;
    while (walk.next(row * walk.columns, column, length)) {
      auto* to = sums + column * kDepth;
      for (int64_t k = 0; k < length; ++k, to += kDepth) {
        const auto value = Registers::broadcast(*values++);
        for (int side = 0; side < kSide; ++side) {
          auto* const place = to + side * Registers::kLanes;
          Registers::store(place, Registers::multiply_add(value, own[side], Registers::load(place)));
        }
      }
    }
  }
}

// `rows` for one token: x has one number per column.
template <typename Registers, typename I, bool single>
SHIRA_TARGET void row_sums(Walk<I, single> walk, int64_t first, int64_t count, const typename Registers::Value* values,
                           const typename Registers::Value* x, typename Registers::Value* sums) {
  for (int64_t row = first; row < first + count; ++row, ++sums) {
    typename Registers::Value sum = 0;
    int64_t column, length;
    while (walk.next(row * walk.columns, column, length))
      for (int64_t k = 0; k < length; ++k) sum = Registers::fused(*values++, x[column + k], sum);
    *sums = sum;
  }
}

// `spread` for one token.
template <typename Registers, typename I, bool single>
SHIRA_TARGET void row_spread(Walk<I, single> walk, int64_t first, int64_t count,
                             const typename Registers::Value* values, const typename Registers::Value* x,
                             typename Registers::Value* sums) {
  for (int64_t row = first; row < first + count; ++row, ++x) {
    int64_t column, length;
    while (walk.next(row * walk.columns, column, length))
      for (int64_t k = 0; k < length; ++k) sums[column + k] = Registers::fused(*values++, *x, sums[column + k]);
  }
}

// The sums over the lanes of kGroup granules from `indices` on, and their rows. A row has `a_row` granules, and
// `inverse` is 1 / a_row. `single`: a granule fills one register.
template <typename Registers, bool single, typename V, typename I>
SHIRA_TARGET inline void granule_group(const I* indices, int64_t granule, int64_t a_row, double inverse,
                                       const typename V::Bits* values, const typename Registers::Value* x,
                                       int64_t* rows, typename Registers::Value* total) {
  constexpr int64_t kLanes = Registers::kLanes;
  const int64_t length = single ? kLanes : granule;
  typename Registers::Register sum[kGroup];
  int64_t offsets[kGroup];
  for (int k = 0; k < kGroup; ++k) {  // a loop of its own, which the compiler does in registers
    // The 0.5 is half an index away from the next whole number, more than rounding bridges below 2^50.
    rows[k] = static_cast<int64_t>((static_cast<double>(indices[k]) + 0.5) * inverse);
    offsets[k] = (indices[k] - rows[k] * a_row) * length;
  }
#pragma GCC unroll 8
  for (int k = 0; k < kGroup; ++k) {
    const auto* const own = x + offsets[k];
    const auto* const value = values + k * length;
    sum[k] = Registers::multiply(Registers::load(Source<V>{value}), Registers::load(own));
    for (int64_t lane = kLanes; lane < length; lane += kLanes)
      sum[k] = Registers::multiply_add(Registers::load(Source<V>{value + lane}), Registers::load(own + lane), sum[k]);
  }
  Registers::sum(sum, total);
}

// One token, with granules that fill registers and end with their rows: each granule is summed across its lanes and
// then added to its row. `sums` has the rows from `first` on.
template <typename Registers, bool single, typename V, typename I>
SHIRA_TARGET void granules_of(const I* indices, int64_t n, int64_t granule, int64_t a_row, double inverse,
                              int64_t first, const typename V::Bits* values, const typename Registers::Value* x,
                              typename Registers::Value* sums) {
  typename Registers::Value total[kGroup];
  int64_t rows[kGroup];
  sums -= first;
  for (; n >= kGroup; n -= kGroup, indices += kGroup, values += kGroup * granule) {
    granule_group<Registers, single, V>(indices, granule, a_row, inverse, values, x, rows, total);
    for (int k = 0; k < kGroup; ++k) sums[rows[k]] += total[k];
  }
  if (n == 0) return;
  I last[kGroup];
  std::vector<typename V::Bits> last_values(kGroup * granule);
  for (int64_t k = 0; k < kGroup; ++k) last[k] = indices[std::min(k, n - 1)];
  std::copy_n(values, n * granule, last_values.data());
  granule_group<Registers, single, V>(last, granule, a_row, inverse, last_values.data(), x, rows, total);
  for (int64_t k = 0; k < n; ++k) sums[rows[k]] += total[k];
}

template <typename Registers, typename V, typename I>
void granule_sums(const I* indices, int64_t n, int64_t granule, int64_t a_row, double inverse, int64_t first,
                  const typename V::Bits* values, const typename Registers::Value* x, typename Registers::Value* sums) {
  const auto loop =
      granule == Registers::kLanes ? granules_of<Registers, true, V, I> : granules_of<Registers, false, V, I>;
  loop(indices, n, granule, a_row, inverse, first, values, x, sums);
}

// One token, with single entries: lane k sums entries k, k + kLanes, ... of a row, and then the lanes are summed.
// `sums` has rows [first, first + count).
template <typename Registers, typename V, typename I>
SHIRA_TARGET void entry_sums(const I* indices, int64_t n, int64_t columns, int64_t first, int64_t count,
                             const typename V::Bits* values, const typename Registers::Value* x,
                             typename Registers::Value* sums) {
  constexpr int64_t kLanes = Registers::kLanes;
  // The last entries again, before others of no row: whole registers must not be read past the end of the tensors.
  I last[2 * kLanes];
  typename V::Bits last_values[2 * kLanes] = {};
  const int64_t tail = std::max<int64_t>(0, n - kLanes);
  std::fill_n(last, 2 * kLanes, static_cast<I>(kNoEntry));
  std::copy(indices + tail, indices + n, last);
  std::copy(values + tail, values + n, last_values);

  typename Registers::Register sum[kGroup];
  typename Registers::Value total[kGroup];
  int64_t entry = 0;
  for (int64_t row = 0; row < count; row += kGroup) {
    const int64_t here = std::min<int64_t>(kGroup, count - row);
    for (int k = 0; k < kGroup; ++k) sum[k] = Registers::zero();
    for (int64_t k = 0; k < here; ++k) {
      const int64_t start = (first + row + k) * columns;
      for (;;) {
        const bool inside = entry + kLanes <= n;
        const I* const at = inside ? indices + entry : last + (entry - tail);
        const auto* const own = inside ? values + entry : last_values + (entry - tail);
        const int64_t taken = Registers::add_entries(at, start, columns, Source<V>{own}, x, sum[k]);
        if (taken < kLanes) {
          entry += taken;
          break;
        }
        entry += kLanes;  // a number, so that the next entries do not wait for `taken`
      }
    }
    Registers::sum(sum, total);
    std::copy_n(total, here, sums + row);
  }
}

template <typename Registers, typename I, bool single>
Loops<typename Registers::Value, I, single> loops_of() {
  return {{rows<Registers, 1, I, single>, rows<Registers, 2, I, single>, rows<Registers, 4, I, single>,
           rows<Registers, 8, I, single>},
          {spread<Registers, 1, I, single>, spread<Registers, 2, I, single>, spread<Registers, 4, I, single>,
           spread<Registers, 8, I, single>},
          row_sums<Registers, I, single>,
          row_spread<Registers, I, single>};
}

template <typename W, typename V, typename I>
Kernel<W, V, I> kernel_of() {
  using C = typename W::Compute;
  using Registers = std::conditional_t<std::is_same_v<C, double>, Doubles, Floats>;
  return {Registers::kLanes,
          pack<Registers, W>,
          pack<Registers, Wide<C>>,
          granule_sums<Registers, V, I>,
          entry_sums<Registers, V, I>,
          {columns<Registers, 1>, columns<Registers, 2>},
          loops_of<Registers, I, true>(),
          loops_of<Registers, I, false>()};
}
