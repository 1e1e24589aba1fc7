// What the machine can do at best, measured in the process and on the threads that the ops use.
//
// An op's time means little without the time that its memory traffic alone takes. These loops do that traffic and
// nothing else, on torch's own pool: a second OpenMP runtime would slow both sides down.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <immintrin.h>
#define BENCH_X86 1
#endif

namespace {
using torch::stable::Tensor;

constexpr int64_t kLine = 64;
constexpr int64_t ahead = 128;       // lines fetched ahead: measured best from 96 to 192
constexpr int64_t kGrain = 512;      // lines that are worth a second thread
constexpr int64_t kBlock = 1 << 12;  // lines of one streaming step

void require(bool condition, const char* sentence) {
  if (!condition) throw std::runtime_error(sentence);
}

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

char* lines_of(const Tensor& t) {
  require(t.is_contiguous(), "shira_bench: tensors must be contiguous");
  auto* p = static_cast<char*>(t.data_ptr());
  require(reinterpret_cast<uintptr_t>(p) % kLine == 0 && bytes_of(t) % kLine == 0,
          "shira_bench: tensors must begin and end at a cache line");
  return p;
}

inline void prefetch_write(const char* p) {
#ifdef BENCH_X86
  asm volatile("prefetchw %0" : : "m"(*p));
#else
  __builtin_prefetch(p, 1, 3);
#endif
}

// ---- touch: reads and writes each listed line once -------------------------------------------------------

// The same bits are written back: the line becomes dirty, the weight does not change.
inline void touch_line(char* p) {
  auto* word = reinterpret_cast<volatile uint64_t*>(p);
  *word = *word;
}

// `ahead`: how many lines early each is fetched for writing; 0 leaves it to the processor, and a negative number
// fetches it as if it were only read, that many lines early.
void touch_(const Tensor& weight, const Tensor& lines, int64_t ahead) {
  using torch::headeronly::ScalarType;
  require(lines.scalar_type() == ScalarType::Int && lines.dim() == 1 && lines.is_contiguous(),
          "touch_: lines must be 1-D contiguous int32");
  char* const base = lines_of(weight);
  const int64_t n = lines.numel(), limit = bytes_of(weight) / kLine;
  const auto* at = static_cast<const int32_t*>(lines.data_ptr());
  // Ends only: a pass over all of them would be work that touch must not count. lines are sorted by the caller.
  require(n == 0 || (at[0] >= 0 && at[n - 1] < limit), "touch_: lines out of range");
  const bool write = ahead > 0;
  ahead = std::abs(ahead);
  const auto fetch = [=](int64_t i) {
    const char* const line = base + int64_t{at[i]} * kLine;
    if (write)
      prefetch_write(line);
    else
      __builtin_prefetch(line, 0, 2);
  };
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    if (ahead == 0) {
      for (int64_t i = begin; i < end; ++i) touch_line(base + int64_t{at[i]} * kLine);
      return;
    }
    for (int64_t i = begin; i < std::min(end, begin + ahead); ++i) fetch(i);
    const int64_t last = std::min(end, n - ahead);
    int64_t i = begin;
    for (; i < last; ++i) {
      fetch(i + ahead);
      touch_line(base + int64_t{at[i]} * kLine);
    }
    for (; i < end; ++i) touch_line(base + int64_t{at[i]} * kLine);
  });
}

// Fills the caches with dirty lines of something else: what the layer before leaves behind.
void chill_(const Tensor& scratch) {
  char* const base = lines_of(scratch);
  torch::stable::parallel_for(0, bytes_of(scratch) / kLine, kBlock, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) touch_line(base + i * kLine);
  });
}

// ---- streams: the best read and copy bandwidth that a plain loop reaches ----------------------------------

// Runs f over the lines of a stream, as wide as this processor goes.
enum class Isa { Portable, Avx2, Avx512 };
Isa isa() {
#ifdef BENCH_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return Isa::Avx512;
  if (__builtin_cpu_supports("avx2")) return Isa::Avx2;
#endif
  return Isa::Portable;
}

// The sum of the 64-bit words of `lines` lines: every byte is used, so none can be skipped.
template <bool prefetch>
uint64_t sum_portable(const char* p, int64_t lines) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i < lines; ++i, p += kLine) {
    if (prefetch) __builtin_prefetch(p + 2048, 0, 3);
    for (int k = 0; k < 8; ++k) sums[k] += reinterpret_cast<const uint64_t*>(p)[k];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}
#ifdef BENCH_X86
template <bool prefetch>
__attribute__((target("avx2"))) uint64_t sum_avx2(const char* p, int64_t lines) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (; lines >= 2; lines -= 2, p += 2 * kLine) {
    if (prefetch) {
      _mm_prefetch(p + 2048, _MM_HINT_T0);
      _mm_prefetch(p + 2048 + kLine, _MM_HINT_T0);
    }
    a = _mm256_add_epi64(a, _mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm256_add_epi64(b, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32)));
    c = _mm256_add_epi64(c, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 64)));
    d = _mm256_add_epi64(d, _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 96)));
  }
  alignas(32) uint64_t sums[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(sums),
                     _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
  return sums[0] + sums[1] + sums[2] + sums[3] + sum_portable<false>(p, lines);
}
template <bool prefetch>
__attribute__((target("avx512f"))) uint64_t sum_avx512(const char* p, int64_t lines) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (; lines >= 4; lines -= 4, p += 4 * kLine) {
    if (prefetch)
      for (int k = 0; k < 4; ++k) _mm_prefetch(p + 2048 + k * kLine, _MM_HINT_T0);
    a = _mm512_add_epi64(a, _mm512_load_si512(p));
    b = _mm512_add_epi64(b, _mm512_load_si512(p + kLine));
    c = _mm512_add_epi64(c, _mm512_load_si512(p + 2 * kLine));
    d = _mm512_add_epi64(d, _mm512_load_si512(p + 3 * kLine));
  }
  alignas(64) uint64_t sums[8];
  _mm512_store_si512(sums, _mm512_add_epi64(_mm512_add_epi64(a, b), _mm512_add_epi64(c, d)));
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total + sum_portable<false>(p, lines);
}
#endif

template <bool prefetch>
uint64_t sum(Isa best, const char* p, int64_t lines) {
#ifdef BENCH_X86
  if (best == Isa::Avx512) return sum_avx512<prefetch>(p, lines);
  if (best == Isa::Avx2) return sum_avx2<prefetch>(p, lines);
#endif
  return sum_portable<prefetch>(p, lines);
}

int64_t read_all(const Tensor& input, bool prefetch) {
  const char* const base = lines_of(input);
  const Isa best = isa();
  std::atomic<uint64_t> total{0};
  torch::stable::parallel_for(0, bytes_of(input) / kLine, kBlock, [&](int64_t begin, int64_t end) {
    const char* p = base + begin * kLine;
    total += prefetch ? sum<true>(best, p, end - begin) : sum<false>(best, p, end - begin);
  });
  return static_cast<int64_t>(total.load());
}

void copy_portable(char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < lines * (kLine / 8); ++i)
    reinterpret_cast<uint64_t*>(to)[i] = reinterpret_cast<const uint64_t*>(from)[i];
}
#ifdef BENCH_X86
template <bool stream>
__attribute__((target("avx2"))) void copy_avx2(char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < lines * 2; ++i, to += 32, from += 32) {
    const __m256i v = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    if (stream)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), v);
    else
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), v);
  }
  if (stream) _mm_sfence();
}
template <bool stream>
__attribute__((target("avx512f"))) void copy_avx512(char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i, to += kLine, from += kLine) {
    const __m512i v = _mm512_load_si512(from);
    if (stream)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), v);
    else
      _mm512_store_si512(to, v);
  }
  if (stream) _mm_sfence();
}
#endif

// `stream`: past the caches, which saves reading the lines that are overwritten whole.
void copy_(const Tensor& out, const Tensor& input, bool stream) {
  require(bytes_of(out) == bytes_of(input), "copy_: out and input must have the same size");
  char* const to = lines_of(out);
  const char* const from = lines_of(input);
  const Isa best = isa();
  torch::stable::parallel_for(0, bytes_of(input) / kLine, kBlock, [&](int64_t begin, int64_t end) {
    char* const t = to + begin * kLine;
    const char* const f = from + begin * kLine;
#ifdef BENCH_X86
    if (best == Isa::Avx512)
      return stream ? copy_avx512<true>(t, f, end - begin) : copy_avx512<false>(t, f, end - begin);
    if (best == Isa::Avx2) return stream ? copy_avx2<true>(t, f, end - begin) : copy_avx2<false>(t, f, end - begin);
#endif
    copy_portable(t, f, end - begin);
  });
}

// ---- products: the multiply-adds of a sparse product, and nothing else ------------------------------------

constexpr int64_t kDepth = 32;                           // tokens side by side in a packed column
constexpr int kSums = 4;                                 // entries whose sums run side by side, for the latency
typedef float Sixteen __attribute__((vector_size(64)));  // two or four registers where there are none of 64 bytes

// The sum over the entries of value * packed column; without `columns` one column, which stays in registers.
#define BENCH_PRODUCTS(name, attribute)                                                                        \
  attribute float name(const float* x, const int32_t* columns, const float* values, int64_t entries) {         \
    Sixteen sums[kSums][2] = {};                                                                               \
    const auto* const own = reinterpret_cast<const Sixteen*>(x);                                               \
    const Sixteen low = own[0], high = own[1];                                                                 \
    for (int64_t i = 0; i + kSums <= entries; i += kSums) {                                                    \
      _Pragma("GCC unroll 4") for (int k = 0; k < kSums; ++k) {                                                \
        const float value = values[i + k];                                                                     \
        const auto* const from = columns == nullptr ? nullptr : own + int64_t{columns[i + k]} * (kDepth / 16); \
        sums[k][0] += value * (from == nullptr ? low : from[0]);                                               \
        sums[k][1] += value * (from == nullptr ? high : from[1]);                                              \
      }                                                                                                        \
    }                                                                                                          \
    Sixteen total = {};                                                                                        \
    for (auto& sum : sums) total += sum[0] + sum[1];                                                           \
    float all = 0;                                                                                             \
    for (int lane = 0; lane < 16; ++lane) all += total[lane];                                                  \
    return all;                                                                                                \
  }
BENCH_PRODUCTS(products_portable, )
#ifdef BENCH_X86
BENCH_PRODUCTS(products_avx2, __attribute__((target("avx2,fma"))))
BENCH_PRODUCTS(products_avx512, __attribute__((target("avx512f,prefer-vector-width=512"))))
#endif

// x: packed columns of kDepth tokens, fp32. columns: one for each of values, or none at all. All of it `blocks` times,
// as for so many blocks of tokens.
double products(const Tensor& x, const Tensor& columns, const Tensor& values, int64_t blocks) {
  using torch::headeronly::ScalarType;
  const int64_t n = values.numel(), limit = x.numel() / kDepth;
  require(x.scalar_type() == ScalarType::Float && values.scalar_type() == ScalarType::Float && limit > 0,
          "products: x and values must be float32, and x have a column");
  require(columns.scalar_type() == ScalarType::Int && (columns.numel() == 0 || columns.numel() == n),
          "products: columns must be int32, one for each of values or none");
  lines_of(x);
  const auto* const at = columns.numel() == 0 ? nullptr : static_cast<const int32_t*>(columns.data_ptr());
  const auto* const own = static_cast<const float*>(values.data_ptr());
  const auto* const from = static_cast<const float*>(x.data_ptr());
  auto loop = products_portable;
#ifdef BENCH_X86
  if (isa() == Isa::Avx2) loop = products_avx2;
  if (isa() == Isa::Avx512) loop = products_avx512;
#endif
  std::atomic<double> total{0};
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) total += loop(from, at, own, n);
  });
  return total.load();
}

}  // namespace

STABLE_TORCH_LIBRARY(shira_bench, m) {
  m.def("touch_(Tensor(a!) weight, Tensor lines, int ahead) -> ()");
  m.def("chill_(Tensor(a!) scratch) -> ()");
  m.def("read(Tensor input, bool prefetch) -> int");
  m.def("copy_(Tensor(a!) out, Tensor input, bool stream) -> ()");
  m.def("products(Tensor x, Tensor columns, Tensor values, int blocks) -> float");
}
STABLE_TORCH_LIBRARY_IMPL(shira_bench, CPU, m) {
  m.impl("touch_", TORCH_BOX(&touch_));
  m.impl("chill_", TORCH_BOX(&chill_));
  m.impl("read", TORCH_BOX(&read_all));
  m.impl("copy_", TORCH_BOX(&copy_));
  m.impl("products", TORCH_BOX(&products));
}
