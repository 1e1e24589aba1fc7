// Products with the sparse matrix of an adapter; the weight itself is never written.
//
// The tokens of one adapter are packed as in sampled_grad: transposed, so that a column's tokens are contiguous, and
// converted to the compute type. Then the mask is walked once per block of tokens: an entry takes one value and one
// packed column, and a row's sums stay in registers (transposed: the packed row). Granules are sorted by column first:
// a few columns are packed at a time, stay in the first-level cache, and are used by all their granules.
//
// A single token is not packed: it stays in L1, where the walk reads its numbers. Its sums have the same order, except
// where few tokens per adapter make single entries and granules that fill registers be summed across lanes: the shapes
// alone decide.
#include "../ops/overlay.h"

#include <numeric>

#include "../dispatch.h"
#include "indices.h"
#include "lanes.h"
#include "mask.h"

namespace shira::cpu {
namespace {

constexpr int64_t kLanesMost = 16;
constexpr int64_t kRows = 128;  // rows per walk, whose sums are then transposed back: a multiple of kLanesMost
constexpr int64_t kPackedBytes = 1 << 19;
constexpr int kSides = 4;              // 1, 2, 4 or 8 registers of tokens lie side by side
constexpr int64_t kColumnGranule = 8;  // packed granules of at least this size are taken column by column
constexpr int64_t kNarrow = std::numeric_limits<int32_t>::max();  // numbers that int32 holds
// Up to this many tokens per adapter, rows are summed across lanes: granules load registers, single entries gather
// them.
constexpr int64_t kFew = 4;
constexpr int kAhead = 8, kEarly = 40;        // granules whose sums, and whose values, are fetched this early
constexpr int64_t kExact = int64_t{1} << 50;  // see granule_sums

// The dtype of numbers in the compute type.
template <typename C>
using Wide = std::conditional_t<std::is_same_v<C, double>, core::Float64, core::Float32>;

// std::memset is as wide as this processor goes.
template <typename C>
void clear(C* numbers, int64_t count) {
  memset(numbers, 0, count * sizeof(C));
}

// The granules of some rows, sorted by column: those of column c are [starts[c], starts[c + 1]).
struct Sorted {
  const int32_t* starts;
  const int32_t* rows;     // within the rows, and some more, which are fetched and not used
  const int32_t* numbers;  // in the list of values, and some more
  bool kept;               // whether all values are kept in this order, or only those of the column at hand
};

// What csrc/cpu/overlay_kernel.h has for each vector width: the loops over a mask of single entries or of granules,
template <typename C, typename I, bool single>
struct Loops {
  using Loop = void (*)(Walk<I, single>, int64_t first, int64_t count, const C* values, const C* x, C* sums);
  Loop spread[kSides], row_sums, row_spread;
};
// and those for the dtypes of input, values and indices.
template <typename W, typename V, typename I>
struct Kernel {
  using C = typename W::Compute;
  int64_t lanes;
  void (*pack)(const typename W::Bits*, int64_t stride, int64_t tokens, int64_t columns, C* to, int64_t depth);
  void (*pack_of_entries)(const typename W::Bits*, int64_t stride, int64_t tokens, int64_t columns, C* to,
                          int64_t depth);
  void (*turn)(const typename Wide<C>::Bits*, int64_t stride, int64_t tokens, int64_t columns, C* to, int64_t depth);
  void (*granule_sums)(const I*, int64_t n, int64_t granule, int64_t a_row, double inverse, int64_t first,
                       const typename V::Bits*, const C* x, C* sums);
  bool (*entry_sums)(const Mask<I>&, int64_t begin, int64_t end, int64_t first, int64_t count, const typename V::Bits*,
                     const C* x, C* sums);
  void (*finish[2])(typename W::Bits* const* outputs, int64_t tokens, int64_t first, int64_t count, C alpha,
                    const C* sums, int64_t stride);
  void (*columns[2])(const Sorted&, int64_t first, int64_t last, int64_t granule, const typename V::Bits*, bool convert,
                     C* own, const C* x, C* sums);
  void (*rows[kSides])(Walk<I, false>, int64_t first, int64_t count, const C* values, const C* x, C* sums);
  void (*entry_rows[kSides])(Walk<I, true>, int64_t first, int64_t count, const C* values, const C* x, C* sums);
  Loops<C, I, true> entries;
  Loops<C, I, false> granules;
};

namespace portable {
using namespace shira::cpu::portable;
#define SHIRA_TARGET
#include "overlay_kernel.h"
#undef SHIRA_TARGET
}  // namespace portable
#if SHIRA_X86
namespace avx2 {
using namespace shira::cpu::avx2;
#define SHIRA_TARGET SHIRA_AVX2
#include "overlay_kernel.h"
#undef SHIRA_TARGET
}  // namespace avx2
namespace avx512 {
using namespace shira::cpu::avx512;
#define SHIRA_TARGET SHIRA_AVX512
#include "overlay_kernel.h"
#undef SHIRA_TARGET
}  // namespace avx512
#endif

template <typename W, typename V, typename I>
Kernel<W, V, I> kernel_of(core::Width width) {
#if SHIRA_X86
  if (width == core::Width::Avx512) return avx512::kernel_of<W, V, I>();
  if (width == core::Width::Avx2) return avx2::kernel_of<W, V, I>();
#endif
  (void)width;
  return portable::kernel_of<W, V, I>();
}

// Some tokens of one call, in order: those in `list`, or those from `first` on.
struct Tokens {
  const int64_t* list;
  int64_t first, count;

  int64_t operator[](int64_t i) const { return list == nullptr ? first + i : list[i]; }
  Tokens part(int64_t begin, int64_t n) const {
    return list == nullptr ? Tokens{nullptr, first + begin, n} : Tokens{list + begin, 0, n};
  }
  bool together() const { return count == 0 || (*this)[count - 1] - (*this)[0] == count - 1; }
};

// One adapter on the tokens of a call.
template <typename W, typename V, typename I>
class Product {
  using C = typename W::Compute;
  using Bits = typename W::Bits;

 public:
  Product(const SparseLinear& problem, const Bits* input, Bits* output, const Tensor& indices, const Tensor& values,
          C alpha, bool adds, core::Width width)
      : problem_(problem),
        kernel_(kernel_of<W, V, I>(width)),
        mask_{indices.const_data_ptr<I>(), indices.numel(), problem.granule, problem.columns()},
        input_(input),
        values_(static_cast<const typename V::Bits*>(values.const_data_ptr())),
        output_(output),
        alpha_(alpha),
        adds_(adds) {}

  // Whether rows of granules are summed across lanes: they fill registers and lie in one row.
  bool across(int64_t adapters) const {
    if (problem_.transposed || problem_.granule == 1) return false;
    return problem_.tokens <= kFew * adapters && aligned() && problem_.granule % kernel_.lanes == 0;
  }

  // The sums [begin, end) of one token with single entries, across lanes. Whether the indices are in order, which they
  // need not be, is the result.
  bool entry_sums(int64_t token, int64_t begin, int64_t end, C* sums) const {
    const int64_t first = begin == 0 ? 0 : mask_.row_start(begin);
    const int64_t last = end == problem_.out_features ? mask_.n : mask_.row_start(end);
    if (first > last || (0 < first && first < mask_.n && mask_.indices[first - 1] >= mask_.indices[first]))
      return false;
    return kernel_.entry_sums(mask_, first, last, begin, end - begin, values_, wide(token).get(), sums);
  }

  // Writes outputs [begin, end) of one token.
  void finish(int64_t token, int64_t begin, int64_t end, const C* sums) const {
    Bits* const to = output_ + token * problem_.out_features;
    kernel_.finish[adds_](&to, 1, begin, end - begin, alpha_, sums, end - begin);
  }

  // Rows [begin, end) of the sums of one token; for the transposed product, all rows.
  void alone(int64_t token, bool across, int64_t begin, int64_t end) const {
    const int64_t outs = problem_.transposed ? problem_.out_features : end - begin;
    const auto x = wide(token), sums = allocate<C>(outs);
    clear(sums.get(), outs);
    if (across) {
      const int64_t first = mask_.row_start(begin) / problem_.granule;
      const int64_t count = mask_.row_start(end) / problem_.granule - first;
      kernel_.granule_sums(mask_.indices + first, count, problem_.granule, a_row(), inverse(), begin,
                           values_ + first * problem_.granule, x.get(), sums.get());
    } else {
      with_loops([&](const auto& loops, auto walk) {
        Numbers numbers;
        for (int64_t row = begin; row < end; row += kRows) {
          const int64_t count = std::min(kRows, end - row);
          const C* const own = numbers(*this, row, row + count);
          if (problem_.transposed)
            loops.row_spread(walk(numbers.first), row, count, own, x.get() + row, sums.get());
          else
            loops.row_sums(walk(numbers.first), row, count, own, x.get(), sums.get() + (row - begin));
        }
      });
    }
    finish(token, problem_.transposed ? 0 : begin, problem_.transposed ? outs : end, sums.get());
  }

  void packed(const Tokens& tokens) const {
    if (!problem_.transposed) return sortable() ? by_column(tokens) : blocks_of_rows(tokens);
    const int64_t most = kernel_.lanes << deepest(), blocks = (tokens.count + most - 1) / most;
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        block_of_columns(tokens.part(block * most, std::min(most, tokens.count - block * most)));
    });
  }

 private:
  // The input of one token in the compute type.
  auto wide(int64_t token) const {
    auto x = allocate<C>(problem_.features);
    const Bits* const from = input_ + token * problem_.features;
    vector_loop(problem_.features, [from, to = x.get()](int64_t i) { to[i] = W::load(from[i]); });
    return x;
  }

  // Whether a row is a whole number of granules: granule n is then in row (n + 0.5) * inverse().
  bool aligned() const { return mask_.columns % problem_.granule == 0 && problem_.limit() < kExact; }
  int64_t a_row() const { return mask_.columns / problem_.granule; }
  double inverse() const { return 1.0 / static_cast<double>(a_row()); }

  // Whether packed granules are taken column by column.
  bool sortable() const {
    return aligned() && problem_.granule >= kColumnGranule &&
           std::max({mask_.n, a_row(), problem_.out_features}) <= kNarrow;
  }

  // The values of some rows, in the compute type.
  struct Numbers {
    std::vector<C> room;
    int64_t first = 0;  // the first entry

    const C* operator()(const Product& product, int64_t begin, int64_t end) {
      first = product.mask_.row_start(begin);
      const typename V::Bits* const from = product.values_ + first;
      if constexpr (std::is_same_v<V, Wide<C>>) return reinterpret_cast<const C*>(from);
      const int64_t n = product.mask_.row_start(end) - first;
      if (static_cast<int64_t>(room.size()) < n) room.resize(n);
      vector_loop(n, [from, to = room.data()](int64_t i) { to[i] = static_cast<C>(V::load(from[i])); });
      return room.data();
    }
  };

  // f(loops, walk): the loops for the mask's granule, and a function that starts a walk at an entry.
  template <typename F>
  void with_loops(const F& f) const {
    if (problem_.granule == 1)
      f(kernel_.entries, [this](int64_t entry) { return Walk<I, true>(mask_, entry); });
    else
      f(kernel_.granules, [this](int64_t entry) { return Walk<I, false>(mask_, entry); });
  }

  // As a power of 2, the most registers of tokens side by side for which the packed data stays in L2. `pairs`: they
  // take half as much.
  int deepest(bool pairs = false) const {
    const int64_t numbers = problem_.transposed ? problem_.out_features : problem_.features;
    const int64_t bytes = numbers * kernel_.lanes * sizeof(C) / (pairs ? 2 : 1);
    int side = 0;
    while (side + 1 < kSides && bytes << (side + 1) <= kPackedBytes) ++side;
    return side;
  }

  // As a power of 2, how many registers of tokens lie side by side.
  int side(int64_t tokens) const {
    int side = 0;
    while ((kernel_.lanes << side) < tokens) ++side;
    return side;
  }

  // The input of some tokens: in place if they are consecutive, else a copy that `room` owns.
  const Bits* gathered(const Tokens& tokens, std::vector<Bits>& room) const {
    if (tokens.together()) return input_ + tokens[0] * problem_.features;
    room.resize(tokens.count * problem_.features);
    for (int64_t i = 0; i < tokens.count; ++i)
      std::copy_n(input_ + tokens[i] * problem_.features, problem_.features, room.data() + i * problem_.features);
    return room.data();
  }

  // The input of some tokens, packed.
  void pack(const Tokens& tokens, int64_t depth, bool pairs, C* x) const {
    std::vector<Bits> room;
    const Bits* const from = gathered(tokens, room);
    const auto loop = pairs ? kernel_.pack_of_entries : kernel_.pack;
    const int64_t squares = (problem_.features + kLanesMost - 1) / kLanesMost, words = pairs ? depth / 2 : depth;
    torch::stable::parallel_for(0, squares, kGrain / (kLanesMost * depth) + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kLanesMost, last = std::min(problem_.features, end * kLanesMost);
      // Square by square: the lines of x are then complete when they leave L1.
      for (int64_t column = first; column < last; column += kLanesMost)
        loop(from + column, problem_.features, tokens.count, std::min(kLanesMost, last - column), x + column * words,
             depth);
    });
  }

  // The places to write the outputs of some tokens.
  std::vector<Bits*> outputs(const Tokens& tokens) const {
    std::vector<Bits*> places(tokens.count);
    for (int64_t i = 0; i < tokens.count; ++i) places[i] = output_ + tokens[i] * problem_.out_features;
    return places;
  }

  // Some rows, and their granules sorted by column.
  struct Share {
    int64_t begin, end;
    int64_t count, longest;  // granules, and those of the longest column
    decltype(allocate<int32_t>(0)) starts = allocate<int32_t>(0), rows = allocate<int32_t>(0),
                                   numbers = allocate<int32_t>(0);
  };

  // A counting sort.
  void sort(Share& share) const {
    const int64_t first = mask_.row_start(share.begin) / problem_.granule;
    const int64_t count = mask_.row_start(share.end) / problem_.granule - first, wide = a_row();
    const auto row = allocate<int32_t>(count), column = allocate<int32_t>(count);
    vector_loop(count, [=, inverse = inverse(), indices = mask_.indices + first, begin = share.begin, row = row.get(),
                        column = column.get()](int64_t i) {
      const I index = indices[i];
      const auto found = static_cast<I>((static_cast<double>(index) + 0.5) * inverse);  // as in granule_group
      row[i] = static_cast<int32_t>(found - static_cast<I>(begin));
      column[i] = static_cast<int32_t>(index - found * static_cast<I>(wide));
    });
    share.count = count;
    share.starts = allocate<int32_t>(wide + 2);
    share.rows = allocate<int32_t>(count + 2 * kAhead);
    share.numbers = allocate<int32_t>(count + 2 * kAhead);
    int32_t* const starts = share.starts.get();
    std::fill_n(starts, wide + 2, 0);
    for (int64_t i = 0; i < count; ++i) ++starts[column[i] + 2];
    share.longest = *std::max_element(starts, starts + wide + 2);
    for (int64_t c = 2; c <= wide + 1; ++c) starts[c] += starts[c - 1];
    const typename V::Bits* const values = values_ + first * problem_.granule;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t at = starts[column[i] + 1]++;
      share.rows[at] = row[i];
      share.numbers[at] = static_cast<int32_t>(first + i);
      __builtin_prefetch(values + (i + kEarly) * problem_.granule, 0, 2);  // they are about to be read out of order
    }
    std::fill_n(share.rows.get() + count, 2 * kAhead, 0);
    std::fill_n(share.numbers.get() + count, 2 * kAhead, 0);
  }

  void by_column(const Tokens& tokens) const {
    const int64_t most = std::min(2 * kernel_.lanes, kLanesMost), blocks = (tokens.count + most - 1) / most;
    const int64_t work = mask_.n * problem_.granule / kGrain, groups = (problem_.out_features + kRows - 1) / kRows;
    const int64_t threads = (torch::stable::get_num_threads() + blocks - 1) / blocks;
    const int64_t parts = std::clamp<int64_t>(work, 1, std::min(groups, threads));
    const int64_t rows = (groups + parts - 1) / parts * kRows, count = (problem_.out_features + rows - 1) / rows;
    std::vector<Share> shares(count);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        shares[k].begin = std::min(problem_.out_features, k * rows);
        shares[k].end = std::min(problem_.out_features, (k + 1) * rows);
        sort(shares[k]);
      }
    });
    // A thread takes several blocks of tokens of one share, for which it sorts the values once.
    torch::stable::parallel_for(0, count * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin / blocks; k * blocks < end; ++k) {
        const int64_t from = std::max(begin, k * blocks) - k * blocks,
                      to = std::min(end, (k + 1) * blocks) - k * blocks;
        share_of(shares[k], tokens.part(from * most, std::min(to * most, tokens.count) - from * most), most);
      }
    });
  }

  // The outputs of some rows, for tokens in blocks of `most`.
  void share_of(const Share& share, const Tokens& tokens, int64_t most) const {
    const int64_t granule = problem_.granule, depth = kernel_.lanes << side(std::min(tokens.count, most));
    const int64_t tall = share.end - share.begin;
    const Sorted sorted{share.starts.get(), share.rows.get(), share.numbers.get(), tokens.count > most};
    // Columns are packed in whole granules and, if they are many, whole registers.
    const int64_t wide = std::min(problem_.features, std::lcm(granule, kLanesMost));
    const auto own = allocate<C>((sorted.kept ? share.count : share.longest) * granule);
    const auto x = allocate<C>(wide * depth), turned = allocate<C>(kRows * kLanesMost),
               sums = allocate<C>(tall * depth);
    clear(sums.get(), tall * depth);
    std::vector<Bits> room;
    for (int64_t first = 0; first < tokens.count; first += most) {
      const Tokens some = tokens.part(first, std::min(most, tokens.count - first));
      const Bits* const from = gathered(some, room);
      for (int64_t column = 0; column < problem_.features; column += wide) {
        const int64_t columns = std::min(wide, problem_.features - column);
        kernel_.pack(from + column, problem_.features, some.count, columns, x.get(), depth);
        kernel_.columns[depth > kernel_.lanes](sorted, column / granule, (column + columns) / granule, granule, values_,
                                               first == 0, own.get(), x.get(), sums.get());
      }
      const std::vector<Bits*> places = outputs(some);
      for (int64_t row = 0; row < tall; row += kRows) {
        const int64_t count = std::min(kRows, tall - row);
        turn_back(places, share.begin + row, count, depth, sums.get() + row * depth, turned.get());
        clear(sums.get() + row * depth, count * depth);  // for the next tokens, while they are in L1
      }
    }
  }

  void blocks_of_rows(const Tokens& tokens) const {
    const bool single = problem_.granule == 1, pairs = single && std::is_same_v<W, core::BFloat16>;
    const int64_t most = kernel_.lanes << deepest(pairs);
    const auto x = allocate<C>(problem_.features * (kernel_.lanes << side(std::min(most, tokens.count))));
    const int64_t groups = (problem_.out_features + kRows - 1) / kRows;
    for (int64_t first = 0; first < tokens.count; first += most) {
      const Tokens some = tokens.part(first, std::min(most, tokens.count - first));
      const int log = side(some.count);
      const int64_t depth = kernel_.lanes << log;
      pack(some, depth, pairs && log > 0, x.get());
      const std::vector<Bits*> places = outputs(some);
      torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
        const auto sums = allocate<C>(kRows * depth), turned = allocate<C>(kRows * kLanesMost);
        Numbers numbers;
        for (int64_t row = begin * kRows; row < std::min(problem_.out_features, end * kRows); row += kRows) {
          const int64_t count = std::min(kRows, problem_.out_features - row);
          const C* const own = numbers(*this, row, row + count);
          if (single)
            kernel_.entry_rows[log](Walk<I, true>(mask_, numbers.first), row, count, own, x.get(), sums.get());
          else
            kernel_.rows[log](Walk<I, false>(mask_, numbers.first), row, count, own, x.get(), sums.get());
          turn_back(places, row, count, depth, sums.get(), turned.get());
        }
      });
    }
  }

  void block_of_columns(const Tokens& tokens) const {
    const int log = side(tokens.count);
    const int64_t depth = kernel_.lanes << log;
    std::vector<Bits> room;
    const Bits* const from = gathered(tokens, room);
    const auto x = allocate<C>(kRows * depth), sums = allocate<C>(problem_.out_features * depth);
    clear(sums.get(), problem_.out_features * depth);
    Numbers numbers;
    with_loops([&](const auto& loops, auto walk) {
      for (int64_t row = 0; row < problem_.features; row += kRows) {
        const int64_t count = std::min(kRows, problem_.features - row);
        const C* const own = numbers(*this, row, row + count);
        kernel_.pack(from + row, problem_.features, tokens.count, count, x.get(), depth);
        loops.spread[log](walk(numbers.first), row, count, own, x.get(), sums.get());
      }
    });
    const auto turned = allocate<C>(kRows * kLanesMost);
    turn_back(outputs(tokens), 0, problem_.out_features, depth, sums.get(), turned.get());
  }

  // Writes outputs [first, first + count) of packed tokens, whose sums are transposed back: in tiles that stay in L1.
  void turn_back(const std::vector<Bits*>& places, int64_t first, int64_t count, int64_t depth, const C* sums,
                 C* turned) const {
    const auto tokens = static_cast<int64_t>(places.size());
    for (int64_t row = 0; row < count; row += kRows, sums += kRows * depth) {
      const int64_t tall = std::min(kRows, count - row);
      for (int64_t token = 0; token < tokens; token += kLanesMost) {
        const int64_t wide = std::min(kLanesMost, tokens - token);
        kernel_.turn(reinterpret_cast<const typename Wide<C>::Bits*>(sums + token), depth, tall, wide, turned, kRows);
        kernel_.finish[adds_](places.data() + token, wide, first + row, tall, alpha_, turned, kRows);
      }
    }
  }

  const SparseLinear& problem_;
  const Kernel<W, V, I> kernel_;
  const Mask<I> mask_;
  const Bits* const input_;
  const typename V::Bits* const values_;
  Bits* const output_;
  const C alpha_;
  const bool adds_;
};

// Whether rows of single entries are summed across lanes.
inline bool few_entries(const SparseLinear& problem, int64_t adapters) {
  return !problem.transposed && problem.granule == 1 && problem.tokens <= kFew * adapters && problem.limit() <= kNarrow;
}

// For the vector width that `width` returns.
template <core::Width (*width)()>
struct Cpu {
  static void content(const char* op, Name name, const Tensor& indices, int64_t limit) {
    check_indices_content(op, name, indices, limit);
  }

  // f(product): one of the call's adapters.
  template <typename W, typename V, typename F>
  static void with_product(const SparseLinear& problem, const Tensor& input, const Tensor& output,
                           const Tensor& indices, const Tensor& values, typename W::Compute alpha, bool adds,
                           const F& f) {
    with_index(indices.scalar_type(), [&](auto index) {
      f(Product<W, V, typename decltype(index)::type>(
          problem, static_cast<const typename W::Bits*>(input.const_data_ptr()),
          static_cast<typename W::Bits*>(output.data_ptr()), indices, values, alpha, adds, width()));
    });
  }

  // f(token, begin, end) for the rows of each token, in as many parts as keep the threads busy.
  template <typename F>
  static void parts_of(const SparseLinear& problem, const Tokens& tokens, int64_t entries, const F& f) {
    const int64_t work = entries + problem.rows();
    const int64_t threads = (torch::stable::get_num_threads() + tokens.count - 1) / tokens.count;
    const int64_t most = problem.transposed ? 1 : std::clamp<int64_t>(work / (4 * kGrain), 1, threads);
    const int64_t rows = std::max<int64_t>(1, (problem.rows() + most - 1) / most);
    const int64_t parts = std::max<int64_t>(1, (problem.rows() + rows - 1) / rows);  // fewer, if rows are few
    torch::stable::parallel_for(0, tokens.count * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % parts * rows;
        f(item / parts, first, std::min(problem.rows(), first + rows));
      }
    });
  }

  // One adapter, whose indices have been checked, on some tokens.
  template <typename P>
  static void one(const SparseLinear& problem, const P& product, const Tokens& tokens, int64_t entries,
                  int64_t adapters) {
    const bool across = product.across(adapters);
    if (!across && tokens.count > 1) return product.packed(tokens);
    parts_of(problem, tokens, entries,
             [&](int64_t token, int64_t begin, int64_t end) { product.alone(tokens[token], across, begin, end); });
  }

  // The sums of some tokens with single entries, a row of `sums` each. Whether the indices are in order is the result.
  template <typename P, typename C>
  static bool entry_sums(const SparseLinear& problem, const P& product, const Tokens& tokens, int64_t entries,
                         C* sums) {
    std::atomic<bool> good{true};
    parts_of(problem, tokens, entries, [&](int64_t token, int64_t begin, int64_t end) {
      if (!product.entry_sums(tokens[token], begin, end, sums + token * problem.out_features + begin))
        good.store(false, std::memory_order_relaxed);
    });
    return good.load();
  }

  // Says what is wrong with indices of which `entry_sums` said that they are not in order.
  static void refuse(const SparseLinear& problem, Name name, const Tensor& indices) {
    content(problem.op, name, indices, problem.limit());
    SHIRA_CHECK(false, problem.op, ": ", name, " must not change during the call");
  }

  static void multiply(const SparseLinear& problem, const Tensor& input, const Tensor& indices, const Tensor& values,
                       const Tensor& result) {
    const Tokens tokens{nullptr, 0, problem.tokens};
    const bool few = result.numel() > 0 && few_entries(problem, 1);
    if (!few) content(problem.op, {"indices"}, indices, problem.limit());
    if (result.numel() == 0) return;
    with_dtypes(input.scalar_type(), values.scalar_type(), [&](auto w, auto v) {
      using W = typename decltype(w)::type;
      with_product<W, typename decltype(v)::type>(
          problem, input, result, indices, values, 1, false, [&](const auto& product) {
            if (!few) return one(problem, product, tokens, values.numel(), 1);
            const auto sums = allocate<typename W::Compute>(problem.tokens * problem.out_features);
            if (!entry_sums(problem, product, tokens, values.numel(), sums.get()))
              refuse(problem, {"indices"}, indices);
            for (int64_t t = 0; t < problem.tokens; ++t)
              product.finish(t, 0, problem.out_features, sums.get() + t * problem.out_features);
          });
    });
  }

  static void add(const SparseLinear& problem, const Tensor& output, const Tensor& input, const Tensors& indices,
                  const Tensors& values, const Tensor& adapters, const Tensor& alphas) {
    const auto count = static_cast<int64_t>(indices.size());
    // Read once: another thread may write to what selects adapters, and all that follows must believe the same.
    const auto* const numbers = adapters.const_data_ptr<int32_t>();
    const std::vector<int32_t> named(numbers, numbers + problem.tokens);
    check_adapter_numbers(problem.op, named.data(), problem.tokens, count);
    // The tokens by adapter; those of one adapter stay in order.
    std::vector<int64_t> starts(count + 1, 0), order(problem.tokens);
    for (int64_t t = 0; t < problem.tokens; ++t)
      if (named[t] >= 0) ++starts[named[t] + 1];
    for (int64_t k = 0; k < count; ++k) starts[k + 1] += starts[k];
    std::vector<int64_t> next(starts);
    for (int64_t t = 0; t < problem.tokens; ++t)
      if (named[t] >= 0) order[next[named[t]]++] = t;
    const auto tokens_of = [&](int64_t k) { return Tokens{order.data() + starts[k], 0, starts[k + 1] - starts[k]}; };
    with_dtypes(output.scalar_type(), values[0].scalar_type(), [&](auto w, auto v) {
      using W = typename decltype(w)::type;
      const auto* const strengths = static_cast<const typename W::Compute*>(alphas.const_data_ptr());
      const std::vector<typename W::Compute> alpha(strengths, strengths + count);
      const auto each = [&](const auto& f) {  // of the adapters that have something to add
        for (int64_t k = 0; k < count; ++k)
          if (tokens_of(k).count > 0 && alpha[k] != 0 && problem.out_features > 0)
            with_product<W, typename decltype(v)::type>(problem, input, output, indices[k], values[k], alpha[k], true,
                                                        [&](const auto& product) { f(k, product); });
      };
      // All indices are checked before the first output is written: so the sums are kept where they are their check.
      const bool few = few_entries(problem, count);
      for (int64_t k = 0; k < count; ++k)
        if (tokens_of(k).count > 0 && (!few || alpha[k] == 0 || problem.out_features == 0))
          content(problem.op, {"indices", k}, indices[k], problem.limit());
      if (!few)
        return each(
            [&](int64_t k, const auto& product) { one(problem, product, tokens_of(k), values[k].numel(), count); });
      const int64_t outs = problem.out_features;
      const auto sums = allocate<typename W::Compute>(starts[count] * outs);
      each([&](int64_t k, const auto& product) {
        if (!entry_sums(problem, product, tokens_of(k), values[k].numel(), sums.get() + starts[k] * outs))
          refuse(problem, {"indices", k}, indices[k]);
      });
      each([&](int64_t k, const auto& product) {
        const Tokens tokens = tokens_of(k);
        for (int64_t t = 0; t < tokens.count; ++t)
          product.finish(tokens[t], 0, outs, sums.get() + (starts[k] + t) * outs);
      });
    });
  }
};

template <core::Width width>
core::Width always() {
  return width;
}

Tensor sparse_linear_in(const Tensor& input, const Tensor& indices, const Tensor& values, int64_t out_features,
                        bool transposed, int64_t granule, std::string name) {
  core::Width width;
  SHIRA_CHECK(core::find_width(name, width), "_sparse_linear: width must be one that this processor has, got ", name);
  using core::Width;
  const auto op = width == Width::Avx512 ? OverlayOps<Cpu<always<Width::Avx512>>>::sparse_linear
                  : width == Width::Avx2 ? OverlayOps<Cpu<always<Width::Avx2>>>::sparse_linear
                                         : OverlayOps<Cpu<always<Width::Portable>>>::sparse_linear;
  return op(input, indices, values, out_features, transposed, granule);
}

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (!shira::backend_is_reference()) shira::OverlayOps<shira::cpu::Cpu<shira::core::widest>>::implement(m);
  m.impl("_sparse_linear", TORCH_BOX(&shira::cpu::sparse_linear_in));
}
