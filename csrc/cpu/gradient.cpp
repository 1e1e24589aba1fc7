// The weight gradient of a linear layer at the selected entries alone.
//
// An entry is the dot product of a column of grad_output and a column of input, over the tokens. Both are strided, so
// blocks of them are packed first: transposed, so that a column's tokens are contiguous, and converted to the compute
// type. Then the mask is visited tile by tile, so that the packed columns of a tile stay in cache:
//
//   for each block of tokens              keeps packed blocks small: see kShare
//     pack input                          shared by all threads
//     for each part                       some rows; threads divide the parts
//       pack grad_output
//       for each run, by tile, by row     entries of one row whose columns are in one tile
//         dots
//
// The order of an entry's sums depends on shape and vector width alone, so that any number of threads, and any mask
// around the entry, gives the same bits.
#include "../ops/gradient.h"

#include <limits>

#include "../dispatch.h"
#include "indices.h"
#include "lanes.h"
#include "mask.h"

namespace shira::cpu {
namespace {

namespace portable {
using namespace shira::cpu::portable;
#define SHIRA_TARGET
#include "gradient_kernel.h"
#include "pack_kernel.h"
#undef SHIRA_TARGET
}  // namespace portable
#if SHIRA_X86
namespace avx2 {
using namespace shira::cpu::avx2;
#define SHIRA_TARGET SHIRA_AVX2
#include "gradient_kernel.h"
#include "pack_kernel.h"
#undef SHIRA_TARGET
}  // namespace avx2
namespace avx512 {
using namespace shira::cpu::avx512;
#define SHIRA_TARGET SHIRA_AVX512
#include "gradient_kernel.h"
#include "pack_kernel.h"
#undef SHIRA_TARGET
}  // namespace avx512
#endif

// A column's tokens in one packed block: 8 of the widest registers.
constexpr int64_t kDepthBytes = 512;
// Columns per tile, as powers of 2. Packed, 32 fit in L1 beside the column of grad_output that meets them: best where a
// mask holds many of them at once, as granules and whole rows do. Otherwise 1024, which fit in L2: runs are longer
// there, so groups are fuller.
constexpr int kSmallTile = 5, kLargeTile = 10;
constexpr int64_t kRowBytes = 256 << 10;  // the packed rows of a part, at most
// Each side's packed block has at most this share of the dense gradient's bytes.
constexpr int64_t kShare = 16;
constexpr int64_t kLanesMost = 16;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The loops for a dtype at one vector width.
template <typename D>
struct Kernel {
  using C = typename D::Compute;
  void (*pack)(const typename D::Bits*, int64_t stride, int64_t tokens, int64_t columns, C* to, int64_t depth);
  void (*dots)(const C* left, const C* right, const int64_t* offsets, int64_t count, int64_t depth, C* to, bool add);
};

template <typename D>
Kernel<D> kernel_of(core::Width width) {
  constexpr bool wide = std::is_same_v<typename D::Compute, double>;
#if SHIRA_X86
  if (width == core::Width::Avx512) {
    using Registers = std::conditional_t<wide, avx512::Doubles, avx512::Floats>;
    return {avx512::pack<Registers, D>, avx512::dots<Registers>};
  }
  if (width == core::Width::Avx2) {
    using Registers = std::conditional_t<wide, avx2::Doubles, avx2::Floats>;
    return {avx2::pack<Registers, D>, avx2::dots<Registers>};
  }
#endif
  using Registers = std::conditional_t<wide, portable::Doubles, portable::Floats>;
  return {portable::pack<Registers, D>, portable::dots<Registers>};
}

// `count` entries, from entry `first` of the part on; `row` counts from the part's first row.
struct Run {
  uint32_t first;
  uint16_t row, count;
};
static_assert(1 << kLargeTile <= std::numeric_limits<uint16_t>::max());

// What one thread handles at a time.
struct Part {
  int64_t row_begin, row_end;
  int64_t entry_begin;  // in the flat result
  std::vector<Run> runs;
  std::vector<bool> used;  // which squares of rows have an entry; the others are not packed
};

// The log2 of a tile's columns, judged by the first entries: small tiles if their runs fill whole groups.
template <typename I>
int tile_of(const Mask<I>& mask, int64_t begin, int64_t end) {
  end = std::min<int64_t>(end, begin + 1024);
  int64_t groups = 0;
  mask.runs(begin, end, kSmallTile,
            [&](int64_t, int64_t, int64_t, int64_t count) { groups += (count + kGroup - 1) / kGroup; });
  return groups * kGroup * 9 <= (end - begin) * 10 ? kSmallTile : kLargeTile;
}

// The runs of a part, sorted by tile and row.
template <typename I>
void find_runs(const Mask<I>& mask, Part& part, int64_t end) {
  const int log = tile_of(mask, part.entry_begin, end);
  std::vector<uint32_t> starts((mask.columns >> log) + 2, 0);
  part.used.assign((part.row_end - part.row_begin + kLanesMost - 1) / kLanesMost, false);
  // The same walk twice: first to count each tile's runs, then to put them in their places.
  mask.runs(part.entry_begin, end, log, [&](int64_t, int64_t row, int64_t tile, int64_t) {
    ++starts[tile + 1];
    part.used[(row - part.row_begin) / kLanesMost] = true;
  });
  for (size_t tile = 1; tile < starts.size(); ++tile) starts[tile] += starts[tile - 1];
  part.runs.resize(starts.back());
  mask.runs(part.entry_begin, end, log, [&](int64_t first, int64_t row, int64_t tile, int64_t count) {
    part.runs[starts[tile]++] = {static_cast<uint32_t>(first - part.entry_begin),
                                 static_cast<uint16_t>(row - part.row_begin), static_cast<uint16_t>(count)};
  });
}

template <typename D, typename I>
class Sampled {
  using Bits = typename D::Bits;
  using C = typename D::Compute;

 public:
  Sampled(const SampledGrad& problem, const Mask<I>& mask, core::Width width)
      : problem_(problem), mask_(mask), kernel_(kernel_of<D>(width)) {
    constexpr int64_t kDeepest = kDepthBytes / sizeof(C);
    const int64_t most = std::clamp(problem.rows / kShare / kLanesMost * kLanesMost, kLanesMost, kDeepest);
    depth_ = std::min(most, round_up(problem.tokens, kLanesMost));
  }

  void run(const Bits* grad_output, const Bits* input, C* result) {
    divide();
    const auto right = allocate<C>(problem_.columns * depth_);
    for (int64_t first = 0; first < problem_.tokens; first += depth_) {
      const int64_t tokens = std::min(depth_, problem_.tokens - first), depth = round_up(tokens, kLanesMost);
      const int64_t squares = (problem_.columns + kLanesMost - 1) / kLanesMost;
      torch::stable::parallel_for(0, squares, kGrain / depth + 1, [&](int64_t begin, int64_t end) {
        const int64_t from = begin * kLanesMost, to = std::min(problem_.columns, end * kLanesMost);
        kernel_.pack(input + first * problem_.columns + from, problem_.columns, tokens, to - from,
                     right.get() + from * depth, depth);
      });
      torch::stable::parallel_for(0, shares_.size(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t share = begin; share < end; ++share) {
          const auto left = allocate<C>(part_rows() * depth);
          for (const Part& part : shares_[share]) {
            pack(part, grad_output + first * problem_.rows, tokens, depth, left.get());
            visit(part, left.get(), right.get(), depth, result, first > 0);
          }
        }
      });
    }
  }

 private:
  int64_t part_rows() const {
    constexpr int64_t kEntries = std::numeric_limits<uint32_t>::max();  // the most that Run can count
    const int64_t most = std::min<int64_t>(kRowBytes / (depth_ * sizeof(C)), kEntries / problem_.columns);
    return std::min(most, longest_);
  }

  // Shares of equal work, in parts of at most that many rows. A row is weighed by its cost: its entries, and the
  // packing of one column, worth about four entries.
  void divide() {
    const auto weight = [&](int64_t row) { return mask_.row_start(row) + 4 * row; };
    const int64_t total = weight(problem_.rows), grain = 16 * kGrain / depth_;
    const int64_t count = std::clamp<int64_t>(total / grain, 1, torch::stable::get_num_threads());
    std::vector<int64_t> cuts(count + 1, problem_.rows);
    cuts[0] = 0;
    for (int64_t share = 1; share < count; ++share) {
      const int64_t wanted = total / count * share;
      int64_t low = 0, high = problem_.rows;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        weight(middle) < wanted ? low = middle + 1 : high = middle;
      }
      cuts[share] = low;
    }
    for (int64_t share = 0; share < count; ++share) longest_ = std::max(longest_, cuts[share + 1] - cuts[share]);
    shares_.resize(count);
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) {
        for (int64_t row = cuts[share]; row < cuts[share + 1]; row += part_rows()) {
          Part part{row, std::min(cuts[share + 1], row + part_rows()), mask_.row_start(row), {}, {}};
          const int64_t stop = mask_.row_start(part.row_end);
          if (stop == part.entry_begin) continue;
          find_runs(mask_, part, stop);
          shares_[share].push_back(std::move(part));
        }
      }
    });
  }

  void pack(const Part& part, const Bits* grad_output, int64_t tokens, int64_t depth, C* left) const {
    const int64_t rows = part.row_end - part.row_begin, squares = part.used.size();
    for (int64_t square = 0; square < squares; ++square) {
      if (!part.used[square]) continue;
      const int64_t from = square * kLanesMost;
      while (square < squares && part.used[square]) ++square;
      const int64_t to = std::min(rows, square * kLanesMost);
      kernel_.pack(grad_output + part.row_begin + from, problem_.rows, tokens, to - from, left + from * depth, depth);
    }
  }

  void visit(const Part& part, const C* left, const C* right, int64_t depth, C* result, bool add) const {
    int64_t offsets[1 << kLargeTile];
    for (const Run& run : part.runs) {
      const int64_t first = part.entry_begin + run.first, row_start = (part.row_begin + run.row) * mask_.columns;
      place(first, first + run.count, row_start, depth, offsets);
      kernel_.dots(left + run.row * depth, right, offsets, run.count, depth, result + first, add);
    }
  }

  // offsets[k] = (column of entry begin + k) * depth.
  void place(int64_t begin, int64_t end, int64_t row_start, int64_t depth, int64_t* offsets) const {
    const I* const indices = mask_.indices;
    const int64_t granule = mask_.granule;
    if (granule == 1) {
      for (int64_t e = begin; e < end; ++e) *offsets++ = (int64_t{indices[e]} - row_start) * depth;
      return;
    }
    int64_t number = begin / granule, within = begin % granule;
    for (int64_t e = begin; e < end; ++number, within = 0) {
      int64_t offset = (int64_t{indices[number]} * granule + within - row_start) * depth;
      const int64_t stop = std::min(end, e + granule - within);
      for (; e < stop; ++e, offset += depth) *offsets++ = offset;
    }
  }

  const SampledGrad& problem_;
  const Mask<I>& mask_;
  const Kernel<D> kernel_;
  int64_t depth_, longest_ = 0;
  std::vector<std::vector<Part>> shares_;
};

template <typename F>
void with_dtype(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Half: return f(core::Float16{});
    case ScalarType::BFloat16: return f(core::BFloat16{});
    case ScalarType::Float: return f(core::Float32{});
    default: return f(core::Float64{});
  }
}

// For the vector width that `width` returns.
template <core::Width (*width)()>
struct Cpu {
  static void content(const char* op, Name name, const Tensor& indices, int64_t limit) {
    check_indices_content(op, name, indices, limit);
  }
  static void sampled(const SampledGrad& problem, const Tensor& grad_output, const Tensor& input, const Tensor& indices,
                      const Tensor& result) {
    SHIRA_CHECK(problem.columns <= std::numeric_limits<uint32_t>::max(),
                "sampled_grad: input must have fewer than 2^32 columns, got ", problem.columns);
    with_dtype(input.scalar_type(), [&](auto dtype) {
      using D = decltype(dtype);
      auto* const out = static_cast<typename D::Compute*>(result.mutable_data_ptr());
      if (problem.tokens == 0) {
        std::fill(out, out + result.numel(), 0);
        return;
      }
      with_index(indices.scalar_type(), [&](auto index) {
        using I = typename decltype(index)::type;
        const Mask<I> mask{indices.const_data_ptr<I>(), indices.numel(), problem.granule, problem.columns};
        Sampled<D, I>(problem, mask, width())
            .run(static_cast<const typename D::Bits*>(grad_output.const_data_ptr()),
                 static_cast<const typename D::Bits*>(input.const_data_ptr()), out);
      });
    });
  }
};

template <core::Width width>
core::Width always() {
  return width;
}

Tensor sampled_grad_in(const Tensor& grad_output, const Tensor& input, const Tensor& indices, int64_t granule,
                       std::string name) {
  core::Width width;
  SHIRA_CHECK(core::find_width(name, width), "_sampled_grad: width must be one that this processor has, got ", name);
  using core::Width;
  const auto op = width == Width::Avx512 ? GradientOps<Cpu<always<Width::Avx512>>>::sampled_grad
                  : width == Width::Avx2 ? GradientOps<Cpu<always<Width::Avx2>>>::sampled_grad
                                         : GradientOps<Cpu<always<Width::Portable>>>::sampled_grad;
  return op(grad_output, input, indices, granule);
}

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (!shira::backend_is_reference()) shira::GradientOps<shira::cpu::Cpu<shira::core::widest>>::implement(m);
  m.impl("_sampled_grad", TORCH_BOX(&shira::cpu::sampled_grad_in));
}
