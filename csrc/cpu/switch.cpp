// The switch family on the CPU: gather, scatter_, swap_, apply_, switch_, scatter_add_ and their foreach_ forms.
//
// A single call is a list of one. Moves of bits know only bytes; arithmetic works on blocks that stay in L1:
// gather a block, compute on contiguous buffers, scatter it back while its lines are still there.
#include <optional>

#include "../checks.h"
#include "../core/arithmetic.h"
#include "../dispatch.h"
#include "../ops/switch.h"
#include "vector.h"
#include "walk.h"

namespace shira::cpu {
namespace {

// ---- moves ---------------------------------------------------------------------------------------------

// One unit of a move. Granules move in the widest unit that divides them; memory need not be aligned to it.
template <int64_t kBytes>
struct Unit {
  char bytes[kBytes];
};

template <int64_t kBytes>
inline Unit<kBytes> load(const char* p) {
  Unit<kBytes> unit;
  memcpy(&unit, p, kBytes);
  return unit;
}
template <int64_t kBytes>
inline void store(char* p, const Unit<kBytes>& unit) {
  memcpy(p, &unit, kBytes);
}

enum class Move { Gather, Scatter, Swap, Apply };

template <Move move, int64_t kBytes, typename I>
SHIRA_INLINE void move_body(const Task& task, int64_t begin, int64_t end) {
  constexpr Fetch fetch = move == Move::Gather ? Fetch::Read : Fetch::Write;
  char *const weight = task.weight, *const values = task.values, *const saved = task.saved;
  walk<kBytes, fetch>(weight, static_cast<const I*>(task.indices), task.granule, begin, end, task.total, true,
                      [=](int64_t offset, int64_t at, int64_t length) SHIRA_INLINE_LAMBDA {
                        char *w = weight + offset, *v = values + at * kBytes, *s = saved + at * kBytes;
                        for (int64_t k = 0; k < length; ++k, w += kBytes, v += kBytes, s += kBytes) {
                          if constexpr (move == Move::Gather) store<kBytes>(v, load<kBytes>(w));
                          if constexpr (move == Move::Scatter) store<kBytes>(w, load<kBytes>(v));
                          if constexpr (move == Move::Swap) {
                            const auto old = load<kBytes>(w);
                            store<kBytes>(w, load<kBytes>(v));
                            store<kBytes>(v, old);
                          }
                          if constexpr (move == Move::Apply) {
                            store<kBytes>(s, load<kBytes>(w));
                            store<kBytes>(w, load<kBytes>(v));
                          }
                        }
                      });
}

// The wide units move in registers as wide as this processor has: a granule of one cache line is one load and one
// store (measured 1.6x on granules of 32 bf16 entries).
template <Move move, int64_t kBytes, typename I>
void move_chunk(const Task& task, int64_t begin, int64_t end) {
  move_body<move, kBytes, I>(task, begin, end);
}
#if SHIRA_X86
template <Move move, int64_t kBytes, typename I>
SHIRA_LOOP_AVX2 void move_chunk_avx2(const Task& task, int64_t begin, int64_t end) {
  move_body<move, kBytes, I>(task, begin, end);
}
template <Move move, int64_t kBytes, typename I>
SHIRA_LOOP_AVX512 void move_chunk_avx512(const Task& task, int64_t begin, int64_t end) {
  move_body<move, kBytes, I>(task, begin, end);
}
#endif

template <Move move, int64_t kBytes, typename I>
auto choose_move() {
#if SHIRA_X86
  if constexpr (kBytes >= 32) {
    if (core::widest() == core::Width::Avx512) return move_chunk_avx512<move, kBytes, I>;
    if (core::widest() == core::Width::Avx2) return move_chunk_avx2<move, kBytes, I>;
  }
#endif
  return move_chunk<move, kBytes, I>;
}

template <Move move, int64_t kBytes>
void set_move(Task& task, ScalarType index_type, int64_t granule_bytes) {
  task.chunk =
      index_type == ScalarType::Int ? choose_move<move, kBytes, int32_t>() : choose_move<move, kBytes, int64_t>();
  task.granule = granule_bytes / kBytes;
  task.total = task.count * task.granule;
}

template <Move move>
void set_move(Task& task, ScalarType index_type, int64_t granule_bytes) {
  if (granule_bytes % 64 == 0) return set_move<move, 64>(task, index_type, granule_bytes);
  if (granule_bytes % 32 == 0) return set_move<move, 32>(task, index_type, granule_bytes);
  if (granule_bytes % 8 == 0) return set_move<move, 8>(task, index_type, granule_bytes);
  if (granule_bytes % 4 == 0) return set_move<move, 4>(task, index_type, granule_bytes);
  if (granule_bytes % 2 == 0) return set_move<move, 2>(task, index_type, granule_bytes);
  return set_move<move, 1>(task, index_type, granule_bytes);
}

Task make_task(const Tensor& weight, const Tensor& indices, const Tensor* values, const Tensor* saved) {
  Task task{};
  task.weight = static_cast<char*>(weight.data_ptr());
  task.indices = indices.data_ptr();
  task.values = values == nullptr ? nullptr : static_cast<char*>(values->data_ptr());
  task.saved = saved == nullptr ? nullptr : static_cast<char*>(saved->data_ptr());
  task.count = indices.numel();
  return task;
}

template <Move move>
Task move_task(const Tensor& weight, const Tensor& indices, const Tensor& values, const Tensor* saved,
               int64_t granule) {
  Task task = make_task(weight, indices, &values, saved);
  set_move<move>(task, indices.scalar_type(), granule * static_cast<int64_t>(weight.element_size()));
  return task;
}

// ---- arithmetic ----------------------------------------------------------------------------------------

// Entries whose lines and buffers stay in the near caches together. The fastest of 32 to 4096, and faster than one
// fused pass over single entries and than prefetching in both passes.
constexpr int64_t kBlock = 256;

// Where the base of a mix comes from: the weight, which is kept in `saved` (apply_) or not kept (scatter_add_), or
// `saved`.
enum class Base { Kept, Dropped, Saved };

// weight[i] = mix(base, values).
template <typename W, typename V, typename I, core::Rule rule, Base origin>
void mix_chunk(const Task& task, int64_t begin, int64_t end) {
  using WB = typename W::Bits;
  using VB = typename V::Bits;
  constexpr int64_t kBytes = sizeof(WB);
  char* const weight = task.weight;
  const I* const indices = static_cast<const I*>(task.indices);
  const auto alpha = static_cast<typename W::Compute>(task.alpha);
  WB mixed[kBlock], spare[kBlock];
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = std::min(end, from + kBlock);
    WB* const base = origin == Base::Dropped ? spare : reinterpret_cast<WB*>(task.saved) + from;
    const VB* const values = reinterpret_cast<const VB*>(task.values) + from;
    if constexpr (origin != Base::Saved)
      walk<kBytes, Fetch::Write>(weight, indices, task.granule, from, to, task.total, from == begin,
                                 [=](int64_t offset, int64_t at, int64_t length) {
                                   memcpy(base + (at - from), weight + offset, length * kBytes);
                                 });
    if constexpr (rule == core::Rule::Keep && origin != Base::Saved) continue;
    vector_loop(to - from, [=, &mixed](int64_t i) { mixed[i] = core::mix<W, V, rule>(base[i], values[i], alpha); });
    constexpr Fetch fetch = origin == Base::Saved ? Fetch::Write : Fetch::None;
    walk<kBytes, fetch>(weight, indices, task.granule, from, to, task.total, from == begin,
                        [=, &mixed](int64_t offset, int64_t at, int64_t length) {
                          memcpy(weight + offset, mixed + (at - from), length * kBytes);
                        });
  }
}

template <Base origin>
Task mix_task(const Tensor& weight, const Tensor& indices, const Tensor& values, const Tensor* saved, double alpha,
              bool delta, int64_t granule) {
  Task task = make_task(weight, indices, &values, saved);
  task.alpha = alpha;
  task.granule = granule;
  task.total = task.count * granule;
  with_dtypes(weight.scalar_type(), values.scalar_type(), [&](auto w, auto v) {
    using W = typename decltype(w)::type;
    using V = typename decltype(v)::type;
    // Alpha is rounded to the compute type before anything depends on it.
    with_rule(core::rule_of(static_cast<typename W::Compute>(alpha), delta), [&](auto rule) {
      with_index(indices.scalar_type(), [&](auto index) {
        task.chunk = mix_chunk<W, V, typename decltype(index)::type, decltype(rule)::value, origin>;
      });
    });
  });
  return task;
}

// apply_ or, where `saved` already holds the base, the rest of it.
template <Base origin>
Task apply_task(const Tensor& weight, const Tensor& indices, const Tensor& values, const Tensor& saved, double alpha,
                bool delta, int64_t granule) {
  // At alpha 1 an overwrite is a move, of any dtype.
  constexpr Move move = origin == Base::Saved ? Move::Scatter : Move::Apply;
  if (!delta && alpha == 1 && values.scalar_type() == weight.scalar_type())
    return move_task<move>(weight, indices, values, &saved, granule);
  return mix_task<origin>(weight, indices, values, &saved, alpha, delta, granule);
}

// ---- switch: a block of what goes out, then what comes in over the same part of the weight -----------------
//
// Lines that both touch come from memory once, and the loops are those of scatter_ and apply_. One merged walk has to
// guess at every entry which list comes next: it was slower than the two passes, 1.3x in bf16 and 1.5x in fp32.
//
// Where both lists name the same entries, what goes out is the base of what comes in: the weight is not read at all.

constexpr int64_t kExchanged = 4096;  // entries of the longer list, whose lines and the other's stay in L2

struct SwitchTask {
  void (*chunk)(const SwitchTask&, int64_t begin, int64_t end);
  Task out, in;
  Task over;  // `in` where saved_in holds the base already
  int64_t granule;
  int64_t entry_bytes;  // of saved
  int64_t total;        // entries of the longer list
};

template <typename O, typename I>
bool same(const O* out, const I* in, int64_t n) {
  if constexpr (std::is_same_v<O, I>) return out == in || memcmp(out, in, n * sizeof(I)) == 0;
  return std::equal(out, out + n, in);
}

// The shorter list is cut where the longer one's granule numbers say.
template <typename O, typename I>
void switch_chunk(const SwitchTask& task, int64_t begin, int64_t end) {
  const O* const out = static_cast<const O*>(task.out.indices);
  const I* const in = static_cast<const I*>(task.in.indices);
  const int64_t n_out = task.out.count, n_in = task.in.count;
  const bool in_leads = n_in >= n_out;
  // The place in the following list when the other one is at `at`.
  const auto follow = [](const auto* list, int64_t n, const auto* leading, int64_t n_leading, int64_t at) {
    if (at == 0 || at == n_leading) return at == 0 ? 0 : n;
    return static_cast<int64_t>(std::lower_bound(list, list + n, int64_t{leading[at]}) - list);
  };
  const auto pass = [](const Task& part, int64_t from, int64_t to) {
    if (from < to) part.chunk(part, from * part.granule, to * part.granule);
  };
  const auto granules = [&](int64_t entries) { return (entries + task.granule - 1) / task.granule; };
  const int64_t step = std::max<int64_t>(1, kExchanged / task.granule), last = granules(end);
  for (int64_t from = granules(begin); from < last; from += step) {
    const int64_t to = std::min(last, from + step);
    const auto out_at = [&](int64_t at) { return in_leads ? follow(out, n_out, in, n_in, at) : at; };
    const auto in_at = [&](int64_t at) { return in_leads ? at : follow(in, n_in, out, n_out, at); };
    const int64_t o = out_at(from), i = in_at(from), n = in_at(to) - i;
    if (n > 0 && n == out_at(to) - o && same(out + o, in + i, n)) {
      const int64_t bytes = task.granule * task.entry_bytes;
      memcpy(task.in.saved + i * bytes, task.out.values + o * bytes, n * bytes);
      pass(task.over, i, i + n);
    } else {
      pass(task.out, o, out_at(to));
      pass(task.in, i, i + n);
    }
  }
}

SwitchTask switch_task(const Tensor& weight, const Tensor& indices_out, const Tensor& saved_out,
                       const Tensor& indices_in, const Tensor& values, const Tensor& saved_in, double alpha, bool delta,
                       int64_t granule) {
  SwitchTask task{};
  task.out = move_task<Move::Scatter>(weight, indices_out, saved_out, nullptr, granule);
  task.in = apply_task<Base::Kept>(weight, indices_in, values, saved_in, alpha, delta, granule);
  task.over = apply_task<Base::Saved>(weight, indices_in, values, saved_in, alpha, delta, granule);
  task.granule = granule;
  task.entry_bytes = static_cast<int64_t>(weight.element_size());
  task.total = std::max(task.out.count, task.in.count) * granule;
  with_index(indices_out.scalar_type(), [&](auto out) {
    with_index(indices_in.scalar_type(),
               [&](auto in) { task.chunk = switch_chunk<typename decltype(out)::type, typename decltype(in)::type>; });
  });
  return task;
}

// ---- the walks, as csrc/ops/switch.h calls them --------------------------------------------------------

struct Cpu {
  static void content(const char* op, Name name, const Tensor& indices, int64_t limit) {
    check_indices_content(op, name, indices, limit);
  }
  static void check(const char* op, const Tensor& indices, int64_t limit) { content(op, {"indices"}, indices, limit); }

  template <Move kind>
  static void move(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    std::vector<Task> tasks;
    tasks.reserve(weights.size());
    for (size_t t = 0; t < weights.size(); ++t)
      tasks.push_back(move_task<kind>(weights[t], indices[t], values[t], nullptr, granule));
    run(tasks);
  }
  static void gather(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    move<Move::Gather>(weights, indices, values, granule);
  }
  static void scatter(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    move<Move::Scatter>(weights, indices, values, granule);
  }
  static void swap(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    move<Move::Swap>(weights, indices, values, granule);
  }

  static void apply(const Tensors& weights, const Tensors& indices, const Tensors& values, const Tensors& saved,
                    double alpha, bool delta, int64_t granule) {
    std::vector<Task> tasks;
    tasks.reserve(weights.size());
    for (size_t t = 0; t < weights.size(); ++t)
      tasks.push_back(apply_task<Base::Kept>(weights[t], indices[t], values[t], saved[t], alpha, delta, granule));
    run(tasks);
  }
  static void exchange(const Tensors& weights, const Tensors& indices_out, const Tensors& saved_out,
                       const Tensors& indices_in, const Tensors& values, const Tensors& saved_in, double alpha,
                       bool delta, int64_t granule) {
    std::vector<SwitchTask> tasks;
    tasks.reserve(weights.size());
    for (size_t t = 0; t < weights.size(); ++t)
      tasks.push_back(switch_task(weights[t], indices_out[t], saved_out[t], indices_in[t], values[t], saved_in[t],
                                  alpha, delta, granule));
    run(tasks);
  }
  static void add(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha, int64_t granule) {
    run(mix_task<Base::Dropped>(weight, indices, values, nullptr, alpha, true, granule));
  }
};

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (!shira::backend_is_reference()) shira::SwitchOps<shira::cpu::Cpu>::implement(m);
}
