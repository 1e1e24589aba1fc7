// The weight gradient of a linear layer at the selected entries alone.
//
// An entry is the dot of a column of grad_output with a column of input, over the tokens. Both are strided, so blocks
// of them are packed first: turned, so that a column's tokens are contiguous, and converted to the compute type. Then
// the mask is visited tile by tile, so that the packed columns of a tile stay in the second-level cache:
//
//   for each block of tokens                     so that packed blocks are small: see kShare
//     pack input                                 threads share it
//     for each block of rows                     threads divide the rows
//       pack grad_output
//       for each block of columns, each row      the entries between two cuts of the row: see cut_rows
//         dots
//
// The sums of an entry are made in an order that depends on shape and vector width alone, so that any number of
// threads, and any mask around the entry, gives the same bits.
#include "../gradient_ops.h"

#include <memory>

#include "gradient_lanes.h"
#include "indices.h"

namespace shira::cpu {
namespace {

namespace portable {
using namespace shira::cpu::portable;
#define SHIRA_TARGET
#include "gradient_kernel.h"
#undef SHIRA_TARGET
}  // namespace portable
#if SHIRA_X86
namespace avx2 {
using namespace shira::cpu::avx2;
#define SHIRA_TARGET SHIRA_AVX2
#include "gradient_kernel.h"
#undef SHIRA_TARGET
}  // namespace avx2
namespace avx512 {
using namespace shira::cpu::avx512;
#define SHIRA_TARGET SHIRA_AVX512
#include "gradient_kernel.h"
#undef SHIRA_TARGET
}  // namespace avx512
#endif

// A column's tokens in one packed block: 8 registers of the widest kind.
constexpr int64_t kDepthBytes = 512;
// Bytes of the packed columns of input that a tile visits, and of the packed rows beside them.
constexpr int64_t kColumnBytes = 512 << 10, kRowBytes = 256 << 10;
// Each side's packed block has at most this share of the dense gradient's bytes.
constexpr int64_t kShare = 16;
constexpr int64_t kOffsets = 512;  // entries whose places are worked out at a time
constexpr int64_t kLanesMost = 16;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The loops of one width for a dtype.
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

// The first entry (of the flat result) at or past a place of the flat weight, looking from granule number `from` on.
template <typename I>
int64_t entry_at(const I* indices, int64_t n, int64_t granule, int64_t place, int64_t& from) {
  while (from < n && (int64_t{indices[from]} + 1) * granule <= place) ++from;
  return from == n ? n * granule : from * granule + std::max<int64_t>(0, place - int64_t{indices[from]} * granule);
}

// starts[row * blocks + block]: the first entry of that row from that block of columns on; one past the last row too.
template <typename I>
std::vector<int64_t> cut_rows(const SampledGrad& problem, const I* indices, int64_t n, int64_t blocks, int64_t width) {
  std::vector<int64_t> starts(problem.rows * blocks + 1);
  torch::stable::parallel_for(0, problem.rows, kGrain / blocks + 1, [&](int64_t begin, int64_t end) {
    const auto past = [&](const I& index, int64_t place) { return (int64_t{index} + 1) * problem.granule <= place; };
    int64_t from = std::lower_bound(indices, indices + n, begin * problem.columns, past) - indices;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t block = 0; block < blocks; ++block)
        starts[row * blocks + block] =
            entry_at(indices, n, problem.granule, row * problem.columns + block * width, from);
  });
  starts.back() = n * problem.granule;
  return starts;
}

// offsets[k] = (column of entry begin + k) * depth.
template <typename I>
void place(const I* indices, int64_t granule, int64_t begin, int64_t end, int64_t row_start, int64_t depth,
           int64_t* offsets) {
  if (granule == 1) {
    for (int64_t e = begin; e < end; ++e) *offsets++ = (int64_t{indices[e]} - row_start) * depth;
    return;
  }
  int64_t number = begin / granule, within = begin % granule;
  for (int64_t e = begin; e < end; ++number, within = 0) {
    int64_t offset = (int64_t{indices[number]} * granule + within - row_start) * depth;
    for (const int64_t stop = std::min(end, e + granule - within); e < stop; ++e, offset += depth) *offsets++ = offset;
  }
}

template <typename D, typename I>
void sampled(const SampledGrad& problem, const typename D::Bits* grad_output, const typename D::Bits* input,
             const I* indices, int64_t n, typename D::Compute* result, core::Width width) {
  using C = typename D::Compute;
  const auto [tokens, rows, columns, granule] = problem;
  const int64_t nnz = n * granule;
  if (tokens == 0) {
    std::fill(result, result + nnz, C{0});
    return;
  }
  const Kernel<D> kernel = kernel_of<D>(width);
  const int64_t item = sizeof(C);
  const int64_t most = std::clamp(rows / kShare / kLanesMost * kLanesMost, kLanesMost, kDepthBytes / item);
  const int64_t deepest = std::min(most, round_up(tokens, kLanesMost));
  const int64_t block_columns = std::max(kLanesMost, kColumnBytes / (deepest * item));
  const int64_t blocks = (columns + block_columns - 1) / block_columns;
  const std::vector<int64_t> starts = cut_rows(problem, indices, n, blocks, block_columns);

  // Aligned to lines: a register that spans two of them loads at half the speed.
  const auto allocate = [](int64_t count) {
    return std::unique_ptr<C[], void (*)(C*)>(static_cast<C*>(::operator new(count * sizeof(C), std::align_val_t{64})),
                                              [](C* p) { ::operator delete(p, std::align_val_t{64}); });
  };
  const auto right = allocate(columns * deepest);
  for (int64_t first = 0; first < tokens; first += deepest) {
    const int64_t here = std::min(deepest, tokens - first), depth = round_up(here, kLanesMost);
    torch::stable::parallel_for(
        0, (columns + kLanesMost - 1) / kLanesMost, kGrain / depth + 1, [&](int64_t begin, int64_t end) {
          const int64_t from = begin * kLanesMost, to = std::min(columns, end * kLanesMost);
          kernel.pack(input + first * columns + from, columns, here, to - from, right.get() + from * depth, depth);
        });
    // Rows weigh what they cost: their entries, and the packing of one column.
    constexpr int64_t kPacking = 4;
    const auto weight = [&](int64_t row) { return starts[row * blocks] + row * kPacking; };
    const auto row_of = [&](int64_t total) {
      int64_t low = 0, high = rows;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        weight(middle) < total ? low = middle + 1 : high = middle;
      }
      return low;
    };
    torch::stable::parallel_for(0, weight(rows), kGrain * 16 / depth + 1, [&](int64_t begin, int64_t end) {
      const int64_t row_begin = row_of(begin), row_end = row_of(end);
      const int64_t block_rows = std::min(row_end - row_begin, std::max(kLanesMost, kRowBytes / (depth * item)));
      if (block_rows == 0) return;
      const auto left = allocate(block_rows * depth);
      int64_t offsets[kOffsets];
      for (int64_t top = row_begin; top < row_end; top += block_rows) {
        const int64_t bottom = std::min(row_end, top + block_rows);
        const auto used = [&](int64_t row) {
          return starts[row * blocks] < starts[std::min(bottom, row + kLanesMost) * blocks];
        };
        for (int64_t row = top; row < bottom; row += kLanesMost) {  // runs of rows with entries: the others are skipped
          if (!used(row)) continue;
          const int64_t run = row;
          while (row < bottom && used(row)) row += kLanesMost;
          kernel.pack(grad_output + first * rows + run, rows, here, std::min(row, bottom) - run,
                      left.get() + (run - top) * depth, depth);
        }
        for (int64_t block = 0; block < blocks; ++block) {
          for (int64_t row = top; row < bottom; ++row) {
            const int64_t stop = starts[row * blocks + block + 1];
            for (int64_t e = starts[row * blocks + block]; e < stop; e += kOffsets) {
              const int64_t count = std::min(kOffsets, stop - e);
              place(indices, granule, e, e + count, row * columns, depth, offsets);
              kernel.dots(left.get() + (row - top) * depth, right.get(), offsets, count, depth, result + e, first > 0);
            }
          }
        }
      }
    });
  }
}

template <typename F>
void with_dtype(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Half: return f(core::Float16{});
    case ScalarType::BFloat16: return f(core::BFloat16{});
    case ScalarType::Float: return f(core::Float32{});
    default: return f(core::Float64{});
  }
}

// In the width that `width` gives.
template <core::Width (*width)()>
struct Cpu {
  static void content(const char* op, Name name, const Tensor& indices, int64_t limit) {
    check_indices_content(op, name, indices, limit);
  }
  static void sampled(const SampledGrad& problem, const Tensor& grad_output, const Tensor& input, const Tensor& indices,
                      const Tensor& result) {
    with_dtype(input.scalar_type(), [&](auto dtype) {
      using D = decltype(dtype);
      const auto compute = [&](const auto* granules) {
        cpu::sampled<D>(problem, static_cast<const typename D::Bits*>(grad_output.const_data_ptr()),
                        static_cast<const typename D::Bits*>(input.const_data_ptr()), granules, indices.numel(),
                        static_cast<typename D::Compute*>(result.mutable_data_ptr()), width());
      };
      if (indices.scalar_type() == ScalarType::Int)
        compute(indices.const_data_ptr<int32_t>());
      else
        compute(indices.const_data_ptr<int64_t>());
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

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) {
  if (!shira::backend_is_reference()) shira::GradientOps<shira::cpu::Cpu<shira::core::widest>>::implement(m);
  m.impl("_sampled_grad", TORCH_BOX(&shira::cpu::sampled_grad_in));
}
