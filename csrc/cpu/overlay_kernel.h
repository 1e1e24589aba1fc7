// The loops of the overlay family. Included once for each vector width, in its namespace: Floats and Doubles are the
// registers of that width, and SHIRA_TARGET lets the compiler use its instructions.
//
// With packed tokens a lane is a token: an output is one sum over its entries in the mask's order (four sums where
// these are single entries), whatever the other tokens are, and however many registers lie side by side. `row_sums`
// makes the one sum for one token.
#include "pack_kernel.h"

// Adds value * packed column to kSide registers of sums.
template <typename Registers, int kSide, bool pairs = false>
SHIRA_TARGET inline void add_column(typename Registers::Value value, const typename Registers::Value* column,
                                    typename Registers::Register* sum) {
  constexpr int64_t kLanes = Registers::kLanes;
  const auto number = Registers::broadcast(value);
  if constexpr (pairs) {
    for (int side = 0; side < kSide; side += 2) {
      typename Registers::Register low, high;
      Registers::unpair(Registers::load(column + side / 2 * kLanes), low, high);
      sum[side] = Registers::multiply_add(number, low, sum[side]);
      sum[side + 1] = Registers::multiply_add(number, high, sum[side + 1]);
    }
  } else {
    for (int side = 0; side < kSide; ++side)
      sum[side] = Registers::multiply_add(number, Registers::load(column + side * kLanes), sum[side]);
  }
}

template <typename Registers, typename V>
SHIRA_TARGET inline void convert_to(const typename V::Bits* from, int64_t count, typename Registers::Value* to) {
  int64_t i = 0;
  for (; i + Registers::kLanes <= count; i += Registers::kLanes)
    Registers::store(to + i, Registers::load(Source<V>{from + i}));
  for (; i < count; ++i) to[i] = static_cast<typename Registers::Value>(V::load(from[i]));
}

// sums[r] = the sums of row `first + r`, in kSide registers of tokens; x has as many per column.
template <typename Registers, int kSide, typename I>
SHIRA_TARGET void rows(Walk<I, false> walk, int64_t first, int64_t count, const typename Registers::Value* values,
                       const typename Registers::Value* x, typename Registers::Value* sums) {
  constexpr int64_t kDepth = kSide * Registers::kLanes;
  for (int64_t row = first; row < first + count; ++row, sums += kDepth) {
    typename Registers::Register sum[kSide];
    for (int side = 0; side < kSide; ++side) sum[side] = Registers::zero();
    int64_t column, length;
    while (walk.next(row * walk.columns, column, length)) {
      const auto* from = x + column * kDepth;
      for (int64_t k = 0; k < length; ++k, from += kDepth) add_column<Registers, kSide>(*values++, from, sum);
    }
    for (int side = 0; side < kSide; ++side) Registers::store(sums + side * Registers::kLanes, sum[side]);
  }
}

// `rows` for single entries, with kChains sums for each output, so that an entry does not wait for the one before it.
// `pairs`: x is packed by pack_pairs.
template <typename Registers, int kSide, bool pairs, typename I>
SHIRA_TARGET void entry_rows(Walk<I, true> walk, int64_t first, int64_t count, const typename Registers::Value* values,
                             const typename Registers::Value* x, typename Registers::Value* sums) {
  constexpr int kChains = 4;
  constexpr int64_t kDepth = kSide * Registers::kLanes, kWords = pairs ? kDepth / 2 : kDepth;
  const I* indices = walk.indices + walk.number;
  int64_t left = walk.n - walk.number;
  for (int64_t row = first; row < first + count; ++row, sums += kDepth) {
    typename Registers::Register sum[kChains][kSide];
    for (int k = 0; k < kChains; ++k)
      for (int side = 0; side < kSide; ++side) sum[k][side] = Registers::zero();
    const int64_t start = row * walk.columns, end = start + walk.columns;
    for (; left >= kChains && indices[kChains - 1] < end; left -= kChains, indices += kChains, values += kChains)
      for (int k = 0; k < kChains; ++k)
        add_column<Registers, kSide, pairs>(values[k], x + (int64_t{indices[k]} - start) * kWords, sum[k]);
    int64_t rest = 0;
    while (rest < std::min<int64_t>(left, kChains - 1) && indices[rest] < end) ++rest;
    for (int k = 0; k < kChains - 1; ++k)
      if (k < rest) add_column<Registers, kSide, pairs>(values[k], x + (int64_t{indices[k]} - start) * kWords, sum[k]);
    left -= rest;
    indices += rest;
    values += rest;
    for (int side = 0; side < kSide; ++side) {
      const auto low = Registers::add(sum[0][side], sum[1][side]), high = Registers::add(sum[2][side], sum[3][side]);
      Registers::store(sums + side * Registers::kLanes, Registers::add(low, high));
    }
  }
}

// Granules of one column of granules, kTall at a time: they need the same packed columns, which are loaded once for
// all. The results are added to sums[row]. `size` is the granule where the compiler knows it, or 0.
template <typename Registers, int kSide, int kTall, int size>
SHIRA_TARGET inline void column_of(const int32_t* rows, int64_t count, int64_t any_size,
                                   const typename Registers::Value* values, const typename Registers::Value* x,
                                   typename Registers::Value* sums) {
  constexpr int64_t kDepth = kSide * Registers::kLanes;
  const int64_t granule = size == 0 ? any_size : size;
  for (; count >= kTall; count -= kTall, rows += kTall, values += kTall * granule) {
    typename Registers::Register sum[kTall][kSide];
    for (int k = 0; k < kTall; ++k) {
      const auto* const from = sums + int64_t{rows[k]} * kDepth;
      for (int side = 0; side < kSide; ++side) sum[k][side] = Registers::load(from + side * Registers::kLanes);
    }
    for (int k = 0; k < kTall; ++k) {
      const auto* const next = sums + int64_t{rows[kAhead + k]} * kDepth;
      for (int side = 0; side < kSide; ++side) __builtin_prefetch(next + side * Registers::kLanes);
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < granule; ++j) {
      typename Registers::Register numbers[kSide];
      for (int side = 0; side < kSide; ++side)
        numbers[side] = Registers::load(x + j * kDepth + side * Registers::kLanes);
      for (int k = 0; k < kTall; ++k) {
        const auto value = Registers::broadcast(values[k * granule + j]);
        for (int side = 0; side < kSide; ++side)
          sum[k][side] = Registers::multiply_add(value, numbers[side], sum[k][side]);
      }
    }
    for (int k = 0; k < kTall; ++k) {
      auto* const to = sums + int64_t{rows[k]} * kDepth;
      for (int side = 0; side < kSide; ++side) Registers::store(to + side * Registers::kLanes, sum[k][side]);
    }
  }
  if constexpr (kTall > 1)
    if (count > 0) column_of<Registers, kSide, kTall / 2, size>(rows, count, any_size, values, x, sums);
}

// `rows` for granules that lie in rows, taken column by column: columns [first, last) of granules, of which x has the
// packed columns. Earlier columns come first, so each sum is made in the same order as in `rows`.
template <typename Registers, int kSide, int size, typename V>
SHIRA_TARGET void columns_of(const Sorted& sorted, int64_t first, int64_t last, int64_t granule,
                             const typename V::Bits* values, bool convert, typename Registers::Value* own,
                             const typename Registers::Value* x, typename Registers::Value* sums) {
  constexpr int kTall = std::min(8, Registers::kSums / kSide);
  for (int64_t column = first; column < last; ++column, x += granule * kSide * Registers::kLanes) {
    const int64_t begin = sorted.starts[column], end = sorted.starts[column + 1];
    auto* const here = sorted.kept ? own + begin * granule : own;
    if (convert) {
      auto* to = here;
      for (int64_t k = begin; k < end; ++k, to += granule) {
        __builtin_prefetch(values + int64_t{sorted.numbers[k + 2 * kAhead]} * granule);
        convert_to<Registers, V>(values + int64_t{sorted.numbers[k]} * granule, granule, to);
      }
    }
    column_of<Registers, kSide, kTall, size>(sorted.rows + begin, end - begin, granule, here, x, sums);
  }
}

template <typename Registers, int kSide, typename V>
void columns(const Sorted& sorted, int64_t first, int64_t last, int64_t granule, const typename V::Bits* values,
             bool convert, typename Registers::Value* own, const typename Registers::Value* x,
             typename Registers::Value* sums) {
  const auto loop = granule == 16 ? columns_of<Registers, kSide, 16, V> : columns_of<Registers, kSide, 0, V>;
  loop(sorted, first, last, granule, values, convert, own, x, sums);
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

constexpr int kFetched = 2048;  // bytes of values that are fetched this early: the processor stops at each page

// The rows of kPlaces granules, and their columns of granules. A row has `a_row` granules, and `inverse` is 1 / a_row.
// A loop of its own, of a length that the compiler knows, so that it is done in registers.
constexpr int kPlaces = 8 * kGroup;
template <typename I>
SHIRA_TARGET inline void places_of(const I* indices, int64_t a_row, double inverse, I* rows, I* columns) {
  for (int k = 0; k < kPlaces; ++k) {
    // The 0.5 is half an index away from the next whole number, more than rounding bridges below 2^50.
    rows[k] = static_cast<I>((static_cast<double>(indices[k]) + 0.5) * inverse);
    columns[k] = indices[k] - rows[k] * static_cast<I>(a_row);
  }
}

// The sums over the lanes of kGroup granules, of which `columns` has the columns. `single`: a granule fills one
// register.
template <typename Registers, bool single, typename V, typename I>
SHIRA_TARGET inline void granule_group(const I* columns, int64_t granule, const typename V::Bits* values,
                                       const typename Registers::Value* x, typename Registers::Value* total) {
  constexpr int64_t kLanes = Registers::kLanes;
  const int64_t length = single ? kLanes : granule;
  typename Registers::Register sum[kGroup];
#pragma GCC unroll 8
  for (int k = 0; k < kGroup; ++k) {
    const auto* const own = x + int64_t{columns[k]} * length;
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
  I rows[kPlaces], columns[kPlaces], last[kPlaces];
  sums -= first;
  for (; n > 0; n -= kPlaces, indices += kPlaces, values += kPlaces * granule) {
    const int64_t here = std::min<int64_t>(n, kPlaces);
    if (here < kPlaces)  // repeats the last index: whole registers must not be read past the end of the tensors
      for (int64_t k = 0; k < kPlaces; ++k) last[k] = indices[std::min(k, here - 1)];
    places_of(here < kPlaces ? last : indices, a_row, inverse, rows, columns);
    int64_t at = 0;
    for (; at + kGroup <= here; at += kGroup) {
      const auto* const ahead = reinterpret_cast<const char*>(values + at * granule) + kFetched;
      for (int64_t byte = 0; byte < kGroup * granule * int64_t{sizeof(*values)}; byte += 64)
        __builtin_prefetch(ahead + byte);
      granule_group<Registers, single, V>(columns + at, granule, values + at * granule, x, total);
      for (int k = 0; k < kGroup; ++k) sums[rows[at + k]] += total[k];
    }
    if (at == here) continue;
    std::vector<typename V::Bits> last_values(kGroup * granule);
    std::copy_n(values + at * granule, (here - at) * granule, last_values.data());
    granule_group<Registers, single, V>(columns + at, granule, last_values.data(), x, total);
    for (int64_t k = at; k < here; ++k) sums[rows[k]] += total[k - at];
  }
}

template <typename Registers, typename V, typename I>
void granule_sums(const I* indices, int64_t n, int64_t granule, int64_t a_row, double inverse, int64_t first,
                  const typename V::Bits* values, const typename Registers::Value* x, typename Registers::Value* sums) {
  const auto loop =
      granule == Registers::kLanes ? granules_of<Registers, true, V, I> : granules_of<Registers, false, V, I>;
  loop(indices, n, granule, a_row, inverse, first, values, x, sums);
}

// sums[k] = the sum of the lanes of row k, of up to kGroup rows.
template <typename Registers>
SHIRA_TARGET inline void sum_lanes(const typename Registers::Value* rows, int64_t count,
                                   typename Registers::Value* sums) {
  typename Registers::Register row[kGroup];
  typename Registers::Value total[kGroup];
  for (int64_t k = 0; k < kGroup; ++k)
    row[k] = k < count ? Registers::load(rows + k * Registers::kLanes) : Registers::zero();
  Registers::sum(row, total);
  std::copy_n(total, count, sums);
}

// One token, with single entries [begin, end): the entries are taken in their order, kLanes at a time, so lane k sums
// those of a row whose number in the mask is k modulo kLanes; then the lanes are summed. `sums` has rows
// [first, first + count).
//
// The indices need not be in order, or be those of these rows: whether they are is the result. It is found here, since
// a pass of its own would read them from memory a second time.
template <typename Registers, typename V, typename I>
SHIRA_TARGET bool entry_sums(const Mask<I>& mask, int64_t begin, int64_t end, int64_t first, int64_t count,
                             const typename V::Bits* values, const typename Registers::Value* x,
                             typename Registers::Value* sums) {
  using Value = typename Registers::Value;
  constexpr int64_t kLanes = Registers::kLanes;
  const I* const indices = mask.indices;
  const int64_t columns = mask.columns;
  alignas(64) Value rows[(kGroup + Registers::kMostRows) * kLanes];  // the lanes of `ended` rows, and of the next
  int64_t ended = 0, done = 0, row_end = (first + 1) * columns;
  auto sum = Registers::zero();
  uint32_t disorder = 0;
  for (int64_t entry = begin; entry < end;) {
    const int64_t lane = entry % kLanes;
    if (lane == 0 && entry + kLanes < end) {
      __builtin_prefetch(reinterpret_cast<const char*>(indices + entry) + kFetched);
      __builtin_prefetch(reinterpret_cast<const char*>(values + entry) + kFetched);
      const bool ends = indices[entry + kLanes - 1] >= row_end;
      int64_t here = ends;  // rows that end
      auto* const to = rows + ended * kLanes;
      const Source<V> own{values + entry};
      if (!Registers::add_in_two(indices + entry, row_end, columns, ends, own, x, sum, to, disorder))
        here = Registers::add_in_rows(indices + entry, row_end, columns, own, x, sum, to);
      if (here >= 0) {
        entry += kLanes;
        ended += here;
        row_end += here * columns;
        if (ended < kGroup) continue;
        int64_t from = 0;
        for (; from + kGroup <= ended; from += kGroup, done += kGroup) {
          if (done + kGroup >= count) return false;
          sum_lanes<Registers>(rows + from * kLanes, kGroup, sums + done);
        }
        if (from < ended) std::copy_n(rows + from * kLanes, (ended - from) * kLanes, rows);
        ended -= from;
        continue;
      }
    }
    // One by one: of the first or the last register, or of one with very many rows.
    Value lanes[kLanes];
    Registers::store(lanes, sum);
    for (const int64_t stop = std::min(end, entry - lane + kLanes); entry < stop; ++entry) {
      const I index = indices[entry];
      if (index < row_end - columns || (entry + 1 < end && indices[entry + 1] <= index)) return false;
      for (; index >= row_end; row_end += columns) {
        if (done + ended + 1 >= count) return false;
        std::copy_n(lanes, kLanes, rows + ended * kLanes);
        std::fill_n(lanes, kLanes, Value{0});
        if (++ended < kGroup) continue;
        sum_lanes<Registers>(rows, kGroup, sums + done);
        done += kGroup;
        ended = 0;
      }
      Value& own = lanes[entry % kLanes];
      own = Registers::fused(static_cast<Value>(V::load(values[entry])), x[index - (row_end - columns)], own);
    }
    sum = Registers::load(lanes);
  }
  if (disorder != 0 || done + ended >= count) return false;
  if (begin < end && (indices[begin] < first * columns || indices[end - 1] >= (first + count) * columns)) return false;
  Registers::store(rows + ended * kLanes, sum);
  sum_lanes<Registers>(rows, ended + 1, sums + done);
  std::fill(sums + done + ended + 1, sums + count, Value{0});  // rows without entries
  return true;
}

// Outputs [0, kCount) from their sums.
template <typename W, bool adds, int64_t kCount>
SHIRA_TARGET inline void finish_part(typename W::Bits* __restrict to, const typename W::Compute* __restrict sums,
                                     typename W::Compute alpha, int64_t any_count) {
  const int64_t count = kCount == 0 ? any_count : kCount;
  if constexpr (adds)
    for (int64_t i = 0; i < count; ++i) to[i] = W::store(W::load(to[i]) + alpha * sums[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = W::store(sums[i]);
}

// Outputs [first, first + count) of some tokens, from sums[token * stride]. Rows of outputs are often a multiple of
// 4 KiB apart, where the same columns share one set of the cache: so each token begins at another line.
template <typename W, bool adds>
SHIRA_TARGET void finish(typename W::Bits* const* outputs, int64_t tokens, int64_t first, int64_t count,
                         typename W::Compute alpha, const typename W::Compute* sums, int64_t stride) {
  constexpr int64_t kPart = 32;
  const int64_t parts = (count + kPart - 1) / kPart;
  for (int64_t step = 0; step < parts; ++step) {
    int64_t part = step;
    for (int64_t token = 0; token < tokens; ++token) {
      const int64_t at = part * kPart;
      auto* const to = outputs[token] + first + at;
      const auto* const own = sums + token * stride + at;
      if (count - at >= kPart)
        finish_part<W, adds, kPart>(to, own, alpha, 0);
      else
        finish_part<W, adds, 0>(to, own, alpha, count - at);
      if (++part == parts) part = 0;
    }
  }
}

template <typename Registers, typename I, bool single>
Loops<typename Registers::Value, I, single> loops_of() {
  return {{spread<Registers, 1, I, single>, spread<Registers, 2, I, single>, spread<Registers, 4, I, single>,
           spread<Registers, 8, I, single>},
          row_sums<Registers, I, single>,
          row_spread<Registers, I, single>};
}

template <typename Registers, typename W>
auto pack_of_entries() {
  if constexpr (std::is_same_v<W, core::BFloat16>)
    return pack_pairs<Registers>;
  else
    return pack<Registers, W>;
}

template <typename W, typename V, typename I>
Kernel<W, V, I> kernel_of() {
  using C = typename W::Compute;
  using Registers = std::conditional_t<std::is_same_v<C, double>, Doubles, Floats>;
  constexpr bool kPairs = std::is_same_v<W, core::BFloat16>;
  return {Registers::kLanes,
          pack<Registers, W>,
          pack_of_entries<Registers, W>(),
          pack<Registers, Wide<C>>,
          granule_sums<Registers, V, I>,
          entry_sums<Registers, V, I>,
          {finish<W, false>, finish<W, true>},
          {columns<Registers, 1, V>, columns<Registers, 2, V>},
          {rows<Registers, 1, I>, rows<Registers, 2, I>, rows<Registers, 4, I>, rows<Registers, 8, I>},
          {entry_rows<Registers, 1, false, I>, entry_rows<Registers, 2, kPairs, I>, entry_rows<Registers, 4, kPairs, I>,
           entry_rows<Registers, 8, kPairs, I>},
          loops_of<Registers, I, true>(),
          loops_of<Registers, I, false>()};
}
