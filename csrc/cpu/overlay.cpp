// Products with the sparse matrix of an adapter; the weight itself is never written.
//
// The tokens of one adapter are packed as in sampled_grad: transposed, so that a column's tokens are contiguous, and
// converted to the compute type. Then the mask is walked once per block of tokens: an entry takes one value and one
// packed column, and a row's sums stay in registers (transposed: the packed row).
//
// A single token is not packed: it stays in L1, where the walk reads its numbers. Its sums have the same order. With
// few tokens per adapter, single entries and granules that fill registers are summed across lanes: another order, so
// the shapes alone decide.
#include "../ops/overlay.h"

#include "../dispatch.h"
#include "indices.h"
#include "lanes.h"
#include "mask.h"

namespace shira::cpu {
namespace {

constexpr int64_t kLanesMost = 16;
constexpr int64_t kRows = 128;  // rows per walk, whose sums are then transposed back: a multiple of kLanesMost
constexpr int64_t kPackedBytes = 1 << 20;
constexpr int kSides = 4;              // 1, 2, 4 or 8 registers of tokens lie side by side
constexpr int64_t kColumnGranule = 8;  // packed granules of at least this size are taken column by column
// Up to this many tokens per adapter, rows are summed across lanes: granules load registers, single entries gather
// them.
constexpr int64_t kFew = 4, kFewEntries = 2;
constexpr int kAhead = 8;                     // packed granules that are fetched this early
constexpr int64_t kExact = int64_t{1} << 50;  // see granule_sums

// The dtype of numbers in the compute type.
template <typename C>
using Wide = std::conditional_t<std::is_same_v<C, double>, core::Float64, core::Float32>;

// A granule of a mask: its number in the list, and its row within the share.
struct Placed {
  int64_t number, row;
};

// What csrc/cpu/overlay_kernel.h has for each vector width: the loops over a mask of single entries or of granules,
template <typename C, typename I, bool single>
struct Loops {
  using Loop = void (*)(Walk<I, single>, int64_t first, int64_t count, const C* values, const C* x, C* sums);
  Loop rows[kSides], spread[kSides], row_sums, row_spread;
};
// and those for the dtypes of input, values and indices.
template <typename W, typename V, typename I>
struct Kernel {
  using C = typename W::Compute;
  int64_t lanes;
  void (*pack)(const typename W::Bits*, int64_t stride, int64_t tokens, int64_t columns, C* to, int64_t depth);
  void (*turn)(const typename Wide<C>::Bits*, int64_t stride, int64_t tokens, int64_t columns, C* to, int64_t depth);
  void (*granule_sums)(const I*, int64_t n, int64_t granule, int64_t a_row, double inverse, int64_t first,
                       const typename V::Bits*, const C* x, C* sums);
  void (*entry_sums)(const I*, int64_t n, int64_t columns, int64_t first, int64_t count, const typename V::Bits*,
                     const C* x, C* sums);
  void (*columns[2])(const Placed*, const int64_t* starts, int64_t count, int64_t granule, const C* values, const C* x,
                     C* sums);
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

  // Whether rows are summed across lanes: of single entries, or of granules that fill registers and lie in one row.
  bool across(int64_t adapters) const {
    if (problem_.transposed) return false;
    if (problem_.granule == 1) return problem_.tokens <= kFewEntries * adapters && problem_.limit() <= kNoEntry;
    return problem_.tokens <= kFew * adapters && aligned() && problem_.granule % kernel_.lanes == 0;
  }

  // Rows [begin, end) of the sums of one token; for the transposed product, all rows.
  void alone(int64_t token, bool across, int64_t begin, int64_t end) const {
    const int64_t outs = problem_.transposed ? problem_.out_features : end - begin;
    const auto x = allocate<C>(problem_.features), sums = allocate<C>(outs);
    const Bits* const from = input_ + token * problem_.features;
    vector_loop(problem_.features, [from, to = x.get()](int64_t i) { to[i] = W::load(from[i]); });
    std::fill_n(sums.get(), outs, C{0});
    if (across) {
      const int64_t first = mask_.row_start(begin) / problem_.granule;
      const int64_t count = mask_.row_start(end) / problem_.granule - first;
      const auto* const values = values_ + first * problem_.granule;
      if (problem_.granule == 1)
        kernel_.entry_sums(mask_.indices + first, count, mask_.columns, begin, outs, values, x.get(), sums.get());
      else
        kernel_.granule_sums(mask_.indices + first, count, problem_.granule, a_row(), inverse(), begin, values, x.get(),
                             sums.get());
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
    finish(token, problem_.transposed ? 0 : begin, outs, sums.get());
  }

  void packed(const Tokens& tokens) const {
    if (!problem_.transposed && aligned() && problem_.granule >= kColumnGranule) return by_column(tokens);
    const int64_t most = kernel_.lanes << deepest();
    if (problem_.transposed) {
      const int64_t blocks = (tokens.count + most - 1) / most;
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block)
          block_of_columns(tokens.part(block * most, std::min(most, tokens.count - block * most)));
      });
    } else {
      for (int64_t first = 0; first < tokens.count; first += most)
        block_of_rows(tokens.part(first, std::min(most, tokens.count - first)));
    }
  }

 private:
  // Whether a row is a whole number of granules: granule n is then in row (n + 0.5) * inverse().
  bool aligned() const { return mask_.columns % problem_.granule == 0 && problem_.limit() < kExact; }
  int64_t a_row() const { return mask_.columns / problem_.granule; }
  double inverse() const { return 1.0 / static_cast<double>(a_row()); }

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

  // As a power of 2, the most registers of tokens side by side for which the packed data stays in L2.
  int deepest() const {
    const int64_t bytes = (problem_.transposed ? problem_.out_features : problem_.features) * kernel_.lanes * sizeof(C);
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
  void pack(const Tokens& tokens, int64_t depth, C* x) const {
    std::vector<Bits> room;
    const Bits* const from = gathered(tokens, room);
    const int64_t squares = (problem_.features + kLanesMost - 1) / kLanesMost;
    torch::stable::parallel_for(0, squares, kGrain / (kLanesMost * depth) + 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kLanesMost, last = std::min(problem_.features, end * kLanesMost);
      // Square by square: the lines of x are then complete when they leave L1.
      for (int64_t column = first; column < last; column += kLanesMost)
        kernel_.pack(from + column, problem_.features, tokens.count, std::min(kLanesMost, last - column),
                     x + column * depth, depth);
    });
  }

  // Some rows, and their granules sorted by column.
  struct Share {
    int64_t begin, end;
    std::vector<int64_t> starts;
    std::vector<Placed> placed;  // and some more, which are fetched and not used
    decltype(allocate<C>(0)) sums = allocate<C>(0);
  };

  // A counting sort.
  void sort(Share& share) const {
    const int64_t first = mask_.row_start(share.begin) / problem_.granule;
    const int64_t last = mask_.row_start(share.end) / problem_.granule, wide = a_row();
    const double inverse = this->inverse();
    const auto row_of = [=](int64_t index) {
      return static_cast<int64_t>((static_cast<double>(index) + 0.5) * inverse);
    };
    share.starts.assign(wide + 2, 0);
    share.placed.resize(last - first + kAhead);
    for (int64_t number = first; number < last; ++number) {
      const int64_t index = mask_.indices[number];
      ++share.starts[index - row_of(index) * wide + 2];
    }
    for (int64_t column = 2; column <= wide + 1; ++column) share.starts[column] += share.starts[column - 1];
    for (int64_t number = first; number < last; ++number) {
      const int64_t index = mask_.indices[number], row = row_of(index);
      share.placed[share.starts[index - row * wide + 1]++] = {number, row - share.begin};
    }
  }

  void by_column(const Tokens& tokens) const {
    const int64_t block = 2 * kernel_.lanes;
    const int64_t work = mask_.n * problem_.granule / kGrain, groups = (problem_.out_features + kRows - 1) / kRows;
    const int64_t most = std::min<int64_t>(groups, torch::stable::get_num_threads());
    std::vector<Share> shares(std::clamp<int64_t>(work, 1, most));
    const int64_t count = shares.size(), rows = (groups + count - 1) / count * kRows;
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        shares[k].begin = std::min(problem_.out_features, k * rows);
        shares[k].end = std::min(problem_.out_features, (k + 1) * rows);
        sort(shares[k]);
        const int64_t size = (shares[k].end - shares[k].begin) * block;
        shares[k].sums = allocate<C>(size);
        std::fill_n(shares[k].sums.get(), size, C{0});
      }
    });
    Numbers numbers;
    const C* const values = numbers(*this, 0, problem_.out_features);
    const auto x = allocate<C>(problem_.features * block);
    for (int64_t first = 0; first < tokens.count; first += block) {
      const Tokens some = tokens.part(first, std::min(block, tokens.count - first));
      const int log = side(some.count);
      const int64_t depth = kernel_.lanes << log;
      pack(some, depth, x.get());
      torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        const auto turned = allocate<C>(kRows * depth);
        for (int64_t k = begin; k < end; ++k) {
          const Share& share = shares[k];
          C* sums = share.sums.get();
          kernel_.columns[log](share.placed.data(), share.starts.data(), a_row(), problem_.granule, values, x.get(),
                               sums);
          for (int64_t row = share.begin; row < share.end; row += kRows, sums += kRows * depth) {
            const int64_t tall = std::min(kRows, share.end - row);
            turn_back(some, row, tall, depth, sums, turned.get());
            std::fill_n(sums, tall * depth, C{0});  // for the next tokens, while they are in L1
          }
        }
      });
    }
  }

  void block_of_rows(const Tokens& tokens) const {
    const int log = side(tokens.count);
    const int64_t depth = kernel_.lanes << log;
    const auto x = allocate<C>(problem_.features * depth);
    pack(tokens, depth, x.get());
    const int64_t groups = (problem_.out_features + kRows - 1) / kRows;
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const auto sums = allocate<C>(kRows * depth), turned = allocate<C>(kRows * depth);
      Numbers numbers;
      with_loops([&](const auto& loops, auto walk) {
        for (int64_t row = begin * kRows; row < std::min(problem_.out_features, end * kRows); row += kRows) {
          const int64_t count = std::min(kRows, problem_.out_features - row);
          const C* const own = numbers(*this, row, row + count);
          loops.rows[log](walk(numbers.first), row, count, own, x.get(), sums.get());
          turn_back(tokens, row, count, depth, sums.get(), turned.get());
        }
      });
    });
  }

  void block_of_columns(const Tokens& tokens) const {
    const int log = side(tokens.count);
    const int64_t depth = kernel_.lanes << log;
    std::vector<Bits> room;
    const Bits* const from = gathered(tokens, room);
    const auto x = allocate<C>(kRows * depth), sums = allocate<C>(problem_.out_features * depth);
    std::fill_n(sums.get(), problem_.out_features * depth, C{0});
    Numbers numbers;
    with_loops([&](const auto& loops, auto walk) {
      for (int64_t row = 0; row < problem_.features; row += kRows) {
        const int64_t count = std::min(kRows, problem_.features - row);
        const C* const own = numbers(*this, row, row + count);
        kernel_.pack(from + row, problem_.features, tokens.count, count, x.get(), depth);
        loops.spread[log](walk(numbers.first), row, count, own, x.get(), sums.get());
      }
    });
    const auto turned = allocate<C>(kRows * depth);
    for (int64_t column = 0; column < problem_.out_features; column += kRows)
      turn_back(tokens, column, std::min(kRows, problem_.out_features - column), depth, sums.get() + column * depth,
                turned.get());
  }

  // Finishes outputs [first, first + count) of packed tokens, whose sums are transposed back.
  void turn_back(const Tokens& tokens, int64_t first, int64_t count, int64_t depth, const C* sums, C* turned) const {
    kernel_.turn(reinterpret_cast<const typename Wide<C>::Bits*>(sums), depth, count, tokens.count, turned, kRows);
    for (int64_t i = 0; i < tokens.count; ++i) finish(tokens[i], first, count, turned + i * kRows);
  }

  // Writes outputs [first, first + count) of one token from their sums.
  void finish(int64_t token, int64_t first, int64_t count, const C* sums) const {
    Bits* const to = output_ + token * problem_.out_features + first;
    if (adds_)
      vector_loop(count, [=, alpha = alpha_](int64_t i) { to[i] = W::store(W::load(to[i]) + alpha * sums[i]); });
    else
      vector_loop(count, [=](int64_t i) { to[i] = W::store(sums[i]); });
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

// For the vector width that `width` returns.
template <core::Width (*width)()>
struct Cpu {
  static void content(const char* op, Name name, const Tensor& indices, int64_t limit) {
    check_indices_content(op, name, indices, limit);
  }

  // One of the call's adapters on some of its tokens.
  template <typename W, typename V>
  static void one(const SparseLinear& problem, const Tensor& input, const Tensor& output, const Tensor& indices,
                  const Tensor& values, typename W::Compute alpha, bool adds, const Tokens& tokens, int64_t adapters) {
    with_index(indices.scalar_type(), [&](auto index) {
      using I = typename decltype(index)::type;
      const Product<W, V, I> product(problem, static_cast<const typename W::Bits*>(input.const_data_ptr()),
                                     static_cast<typename W::Bits*>(output.data_ptr()), indices, values, alpha, adds,
                                     width());
      const bool across = product.across(adapters);
      if (!across && tokens.count > 1) return product.packed(tokens);
      // Each token's rows are split into as many parts as keep the threads busy.
      const int64_t work = values.numel() + problem.rows();
      const int64_t threads = (torch::stable::get_num_threads() + tokens.count - 1) / tokens.count;
      const int64_t most = problem.transposed ? 1 : std::clamp<int64_t>(work / (4 * kGrain), 1, threads);
      const int64_t rows = std::max<int64_t>(1, (problem.rows() + most - 1) / most);
      const int64_t parts = std::max<int64_t>(1, (problem.rows() + rows - 1) / rows);  // fewer, if rows are few
      torch::stable::parallel_for(0, tokens.count * parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t first = item % parts * rows;
          product.alone(tokens[item / parts], across, first, std::min(problem.rows(), first + rows));
        }
      });
    });
  }

  static void multiply(const SparseLinear& problem, const Tensor& input, const Tensor& indices, const Tensor& values,
                       const Tensor& result) {
    with_dtypes(input.scalar_type(), values.scalar_type(), [&](auto w, auto v) {
      one<typename decltype(w)::type, typename decltype(v)::type>(problem, input, result, indices, values, 1, false,
                                                                  {nullptr, 0, problem.tokens}, 1);
    });
  }

  static void add(const SparseLinear& problem, const Tensor& output, const Tensor& input, const Tensors& indices,
                  const Tensors& values, const Tensor& adapters, const Tensor& alphas) {
    const auto count = static_cast<int64_t>(indices.size());
    const int32_t* const named = adapters.const_data_ptr<int32_t>();
    check_adapter_numbers(problem.op, named, problem.tokens, count);
    // The tokens by adapter; those of one adapter stay in order.
    std::vector<int64_t> starts(count + 1, 0), order(problem.tokens);
    for (int64_t t = 0; t < problem.tokens; ++t)
      if (named[t] >= 0) ++starts[named[t] + 1];
    for (int64_t k = 0; k < count; ++k) {
      if (starts[k + 1] > 0) content(problem.op, {"indices", k}, indices[k], problem.limit());
      starts[k + 1] += starts[k];
    }
    std::vector<int64_t> next(starts);
    for (int64_t t = 0; t < problem.tokens; ++t)
      if (named[t] >= 0) order[next[named[t]]++] = t;
    if (problem.out_features == 0) return;
    with_dtypes(output.scalar_type(), values[0].scalar_type(), [&](auto w, auto v) {
      using W = typename decltype(w)::type;
      const auto* const strengths = static_cast<const typename W::Compute*>(alphas.const_data_ptr());
      for (int64_t k = 0; k < count; ++k) {
        const Tokens tokens{order.data() + starts[k], 0, starts[k + 1] - starts[k]};
        if (tokens.count > 0 && strengths[k] != 0)
          one<W, typename decltype(v)::type>(problem, input, output, indices[k], values[k], strengths[k], true, tokens,
                                             count);
      }
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
