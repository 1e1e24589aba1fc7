// The switch family on the CPU: gather, scatter_, swap_, apply_, switch_, scatter_add_ and their foreach_ forms.
//
// A single call is a list of one. Moves of bits know only bytes; arithmetic works on blocks that stay in L1:
// gather a block, compute on contiguous buffers, scatter it back while its lines are still there.
#include <optional>

#include "../checks.h"
#include "../core/arithmetic.h"
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
void move_chunk(const Task& task, int64_t begin, int64_t end) {
  constexpr Fetch fetch = move == Move::Gather ? Fetch::Read : Fetch::Write;
  char *const weight = task.weight, *const values = task.values, *const saved = task.saved;
  walk<kBytes, fetch>(weight, static_cast<const I*>(task.indices), task.granule, begin, end, task.total, true,
                      [=](int64_t offset, int64_t at, int64_t length) {
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

template <Move move, int64_t kBytes>
void set_move(Task& task, ScalarType index_type, int64_t granule_bytes) {
  task.chunk = index_type == ScalarType::Int ? move_chunk<move, kBytes, int32_t> : move_chunk<move, kBytes, int64_t>;
  task.granule = granule_bytes / kBytes;
  task.total = task.n_in * task.granule;
}

template <Move move>
void set_move(Task& task, ScalarType index_type, int64_t granule_bytes) {
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
  task.n_in = indices.numel();
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

constexpr int64_t kBlock = 256;  // entries whose lines and buffers stay in L1 together

// f(Type<W>{}, Type<V>{}) for a weight of dtype W and values of dtype V.
template <typename T>
struct Type {
  using type = T;
};
template <typename F>
auto with_dtypes(ScalarType weight, ScalarType values, F&& f) {
  using namespace core;
  const bool fp32 = values == ScalarType::Float;
  switch (weight) {
    case ScalarType::Half: return fp32 ? f(Type<Float16>{}, Type<Float32>{}) : f(Type<Float16>{}, Type<Float16>{});
    case ScalarType::BFloat16:
      return fp32 ? f(Type<BFloat16>{}, Type<Float32>{}) : f(Type<BFloat16>{}, Type<BFloat16>{});
    case ScalarType::Float: return f(Type<Float32>{}, Type<Float32>{});
    default: return fp32 ? f(Type<Float64>{}, Type<Float32>{}) : f(Type<Float64>{}, Type<Float64>{});
  }
}
template <typename F>
auto with_index(ScalarType type, F&& f) {
  return type == ScalarType::Int ? f(Type<int32_t>{}) : f(Type<int64_t>{});
}
template <typename F>
auto with_rule(core::Rule rule, F&& f) {
  using core::Rule;
  switch (rule) {
    case Rule::Keep: return f(std::integral_constant<Rule, Rule::Keep>{});
    case Rule::Overwrite: return f(std::integral_constant<Rule, Rule::Overwrite>{});
    case Rule::Blend: return f(std::integral_constant<Rule, Rule::Blend>{});
    default: return f(std::integral_constant<Rule, Rule::Delta>{});
  }
}

// saved = weight[i], then weight[i] = mix(saved, values). Without `saved` (scatter_add_) the base is not kept.
template <typename W, typename V, typename I, core::Rule rule, bool keep>
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
    WB* const base = keep ? reinterpret_cast<WB*>(task.saved) + from : spare;
    const VB* const values = reinterpret_cast<const VB*>(task.values) + from;
    walk<kBytes, Fetch::Write>(weight, indices, task.granule, from, to, task.total, from == begin,
                               [=](int64_t offset, int64_t at, int64_t length) {
                                 memcpy(base + (at - from), weight + offset, length * kBytes);
                               });
    if constexpr (rule == core::Rule::Keep) continue;
    vector_loop(to - from, [=, &mixed](int64_t i) { mixed[i] = core::mix<W, V, rule>(base[i], values[i], alpha); });
    walk<kBytes, Fetch::None>(weight, indices, task.granule, from, to, task.total, false,
                              [=, &mixed](int64_t offset, int64_t at, int64_t length) {
                                memcpy(weight + offset, mixed + (at - from), length * kBytes);
                              });
  }
}

template <bool keep>
Task mix_task(const Tensor& weight, const Tensor& indices, const Tensor& values, const Tensor* saved, double alpha,
              bool delta, int64_t granule) {
  Task task = make_task(weight, indices, &values, saved);
  task.alpha = alpha;
  task.granule = granule;
  task.total = task.n_in * granule;
  with_dtypes(weight.scalar_type(), values.scalar_type(), [&](auto w, auto v) {
    using W = typename decltype(w)::type;
    using V = typename decltype(v)::type;
    // Alpha rounds to the compute type before anything is decided by it.
    with_rule(core::rule_of(static_cast<typename W::Compute>(alpha), delta), [&](auto rule) {
      with_index(indices.scalar_type(), [&](auto index) {
        task.chunk = mix_chunk<W, V, typename decltype(index)::type, decltype(rule)::value, keep>;
      });
    });
  });
  return task;
}

Task apply_task(const Tensor& weight, const Tensor& indices, const Tensor& values, const Tensor& saved, double alpha,
                bool delta, int64_t granule) {
  // At alpha 1 an overwrite is a move, of any dtype.
  if (!delta && alpha == 1 && values.scalar_type() == weight.scalar_type())
    return move_task<Move::Apply>(weight, indices, values, &saved, granule);
  return mix_task<true>(weight, indices, values, &saved, alpha, delta, granule);
}

// ---- switch: one walk over two sorted lists -----------------------------------------------------------

// A move of bits, for the dtypes and strengths that need no arithmetic.
template <int64_t kBytes>
struct MoveOf {
  using WB = Unit<kBytes>;
  using VB = Unit<kBytes>;
  static inline WB mix(const WB&, const VB& value, double) { return value; }
};
template <typename W, typename V, core::Rule rule>
struct MixOf {
  using WB = typename W::Bits;
  using VB = typename V::Bits;
  static inline WB mix(const WB& base, const VB& value, double alpha) {
    return core::mix<W, V, rule>(base, value, static_cast<typename W::Compute>(alpha));
  }
};

// Chunks are cut on the longer list; the other list's share follows from the granule numbers.
template <typename Mix, typename O, typename I>
void switch_chunk(const Task& task, int64_t begin, int64_t end) {
  using WB = typename Mix::WB;
  using VB = typename Mix::VB;
  constexpr int64_t kBytes = sizeof(WB);
  const O* const out = static_cast<const O*>(task.indices_out);
  const I* const in = static_cast<const I*>(task.indices);
  const int64_t granule = task.granule, bytes = granule * kBytes;
  int64_t i = begin, i_end = end, o = begin, o_end = end;
  const auto share = [](const auto* list, int64_t n, const auto* longer, int64_t n_longer, int64_t cut) {
    if (cut == 0) return int64_t{0};
    if (cut == n_longer) return n;
    return static_cast<int64_t>(std::lower_bound(list, list + n, static_cast<int64_t>(longer[cut])) - list);
  };
  if (task.n_in >= task.n_out) {
    o = share(out, task.n_out, in, task.n_in, begin);
    o_end = share(out, task.n_out, in, task.n_in, end);
  } else {
    i = share(in, task.n_in, out, task.n_out, begin);
    i_end = share(in, task.n_in, out, task.n_out, end);
  }
  const int64_t ahead = std::max<int64_t>(1, kAhead * kLine / std::max(bytes, kLine));
  const auto read_w = [](const char* p) {
    WB x;
    memcpy(&x, p, kBytes);
    return x;
  };
  while (i < i_end || o < o_end) {
    if (i + ahead < i_end) prefetch<Fetch::Write>(task.weight + int64_t{in[i + ahead]} * bytes, bytes);
    if (o + ahead < o_end) prefetch<Fetch::Write>(task.weight + int64_t{out[o + ahead]} * bytes, bytes);
    const bool has_in = i < i_end && (o >= o_end || int64_t{in[i]} <= int64_t{out[o]});
    const bool has_out = o < o_end && (i >= i_end || int64_t{out[o]} <= int64_t{in[i]});
    char* const w = task.weight + (has_in ? int64_t{in[i]} : int64_t{out[o]}) * bytes;
    const char* const base = has_out ? task.saved_out + o * bytes : w;
    if (!has_in) {
      for (int64_t k = 0; k < granule; ++k) memcpy(w + k * kBytes, base + k * kBytes, kBytes);
    } else {
      char* const saved = task.saved + i * bytes;
      const char* const values = task.values + i * granule * static_cast<int64_t>(sizeof(VB));
      for (int64_t k = 0; k < granule; ++k) {
        VB value;
        memcpy(&value, values + k * sizeof(VB), sizeof(VB));
        const WB old = read_w(base + k * kBytes), mixed = Mix::mix(old, value, task.alpha);
        memcpy(saved + k * kBytes, &old, kBytes);
        memcpy(w + k * kBytes, &mixed, kBytes);
      }
    }
    i += has_in;
    o += has_out;
  }
}

template <typename Mix>
void set_switch(Task& task, ScalarType out_type, ScalarType in_type, int64_t granule) {
  with_index(out_type, [&](auto out) {
    with_index(in_type, [&](auto in) {
      task.chunk = switch_chunk<Mix, typename decltype(out)::type, typename decltype(in)::type>;
    });
  });
  task.granule = granule;
  task.total = std::max(task.n_in, task.n_out);
}

Task switch_task(const Tensor& weight, const Tensor& indices_out, const Tensor& saved_out, const Tensor& indices_in,
                 const Tensor& values, const Tensor& saved_in, double alpha, bool delta, int64_t granule) {
  Task task = make_task(weight, indices_in, &values, &saved_in);
  task.alpha = alpha;
  task.indices_out = indices_out.data_ptr();
  task.saved_out = static_cast<const char*>(saved_out.data_ptr());
  task.n_out = indices_out.numel();
  const ScalarType out_type = indices_out.scalar_type(), in_type = indices_in.scalar_type();
  if (!delta && alpha == 1 && values.scalar_type() == weight.scalar_type()) {
    const int64_t bytes = granule * static_cast<int64_t>(weight.element_size());
    if (bytes % 32 == 0) set_switch<MoveOf<32>>(task, out_type, in_type, bytes / 32);
    else if (bytes % 8 == 0) set_switch<MoveOf<8>>(task, out_type, in_type, bytes / 8);
    else if (bytes % 4 == 0) set_switch<MoveOf<4>>(task, out_type, in_type, bytes / 4);
    else if (bytes % 2 == 0) set_switch<MoveOf<2>>(task, out_type, in_type, bytes / 2);
    else set_switch<MoveOf<1>>(task, out_type, in_type, bytes);
    return task;
  }
  with_dtypes(weight.scalar_type(), values.scalar_type(), [&](auto w, auto v) {
    using W = typename decltype(w)::type;
    using V = typename decltype(v)::type;
    with_rule(core::rule_of(static_cast<typename W::Compute>(alpha), delta), [&](auto rule) {
      set_switch<MixOf<W, V, decltype(rule)::value>>(task, out_type, in_type, granule);
    });
  });
  return task;
}

// ---- ops: check everything, then walk -----------------------------------------------------------------

using Tensors = std::vector<Tensor>;

// One tensor's arguments within a call: their names, and the checks that stand in the order of the schema.
struct Call {
  const char* op;
  int64_t granule;
  bool list;
  Overlap overlap;

  Call(const char* op, int64_t granule, bool list) : op(op), granule(granule), list(list), overlap(op) {
    check_granule(op, granule);
  }
  Name name(const char* single, const char* plural, int64_t member) const {
    return list ? Name{plural, member} : Name{single};
  }
  Name weight_name(int64_t member) const { return name("weight", "weights", member); }
  Name name(const char* word, int64_t member) const { return name(word, word, member); }

  void weights(const Tensors& weights, Kind kind) {
    for (size_t t = 0; t < weights.size(); ++t) {
      check_weight(op, weights[t], granule, kind, weight_name(t));
      SHIRA_CHECK(weights[t].device() == weights[0].device(), op, ": weights[", t,
                  "] must be on the device of weights[0] ", device_name(weights[0]), ", got ",
                  device_name(weights[t]));
    }
  }
  void indices(const char* word, const Tensor& indices, const Tensor& weight, int64_t member) const {
    check_device(op, name(word, member), indices, weight, weight_name(member));
    shira::check_indices(op, name(word, member), indices);
  }
  void values(const char* word, const Tensor& values, Values dtypes, const Tensor& weight, const Tensor& indices,
              int64_t member) const {
    check_values(op, name(word, member), values, dtypes, weight, weight_name(member), indices, granule);
  }
  void alpha(const Tensor& weight, double alpha, bool delta) const {
    SHIRA_CHECK(is_float(weight.scalar_type()) || (alpha == 1 && !delta), op,
                ": alpha must be 1 and delta False for weights of dtype ", dtype_name(weight.scalar_type()),
                ", got alpha ", alpha, ", delta ", delta ? "True" : "False");
  }
  void content(const char* word, const Tensor& indices, const Tensor& weight, int64_t member) const {
    check_indices_content(op, name(word, member), indices, weight.numel() / granule);
  }
};

Tensor gather_one(const Tensor& weight, const Tensor& indices, int64_t granule, Task& task) {
  Tensor values = torch::stable::new_empty(weight, {indices.numel() * granule});
  task = move_task<Move::Gather>(weight, indices, values, nullptr, granule);
  return values;
}

Tensors gather_list(const char* op, const Tensors& weights, const Tensors& indices, int64_t granule, bool list) {
  Call call(op, granule, list);
  check_list_length(op, "indices", indices, weights.size());
  call.weights(weights, Kind::Moves);
  for (size_t t = 0; t < weights.size(); ++t) call.indices("indices", indices[t], weights[t], t);
  for (size_t t = 0; t < weights.size(); ++t) call.content("indices", indices[t], weights[t], t);
  std::vector<Task> tasks(weights.size());
  Tensors values;
  values.reserve(weights.size());
  for (size_t t = 0; t < weights.size(); ++t)
    values.push_back(gather_one(weights[t], indices[t], granule, tasks[t]));
  run(tasks);
  return values;
}

template <Move move>
void move_list(const char* op, const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule,
               bool list) {
  Call call(op, granule, list);
  check_list_length(op, "indices", indices, weights.size());
  check_list_length(op, "values", values, weights.size());
  call.weights(weights, Kind::Moves);
  for (size_t t = 0; t < weights.size(); ++t) {
    call.indices("indices", indices[t], weights[t], t);
    call.values("values", values[t], Values::Weight, weights[t], indices[t], t);
  }
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.weight_name(t), weights[t], true);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("indices", t), indices[t], false);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("values", t), values[t], move == Move::Swap);
  call.overlap.check();
  for (size_t t = 0; t < weights.size(); ++t) call.content("indices", indices[t], weights[t], t);
  std::vector<Task> tasks;
  tasks.reserve(weights.size());
  for (size_t t = 0; t < weights.size(); ++t)
    tasks.push_back(move_task<move>(weights[t], indices[t], values[t], nullptr, granule));
  run(tasks);
}

void apply_list(const char* op, const Tensors& weights, const Tensors& indices, const Tensors& values,
                const Tensors& saved, double alpha, bool delta, int64_t granule, bool list) {
  Call call(op, granule, list);
  check_list_length(op, "indices", indices, weights.size());
  check_list_length(op, "values", values, weights.size());
  check_list_length(op, "saved", saved, weights.size());
  call.weights(weights, Kind::Moves);
  for (size_t t = 0; t < weights.size(); ++t) {
    call.indices("indices", indices[t], weights[t], t);
    call.values("values", values[t], Values::WeightOrFloat32, weights[t], indices[t], t);
    call.values("saved", saved[t], Values::Weight, weights[t], indices[t], t);
  }
  for (const Tensor& weight : weights) call.alpha(weight, alpha, delta);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.weight_name(t), weights[t], true);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("indices", t), indices[t], false);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("values", t), values[t], false);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("saved", t), saved[t], true);
  call.overlap.check();
  for (size_t t = 0; t < weights.size(); ++t) call.content("indices", indices[t], weights[t], t);
  std::vector<Task> tasks;
  tasks.reserve(weights.size());
  for (size_t t = 0; t < weights.size(); ++t)
    tasks.push_back(apply_task(weights[t], indices[t], values[t], saved[t], alpha, delta, granule));
  run(tasks);
}

void switch_list(const char* op, const Tensors& weights, const Tensors& indices_out, const Tensors& saved_out,
                 const Tensors& indices_in, const Tensors& values, const Tensors& saved_in, double alpha, bool delta,
                 int64_t granule, bool list) {
  Call call(op, granule, list);
  check_list_length(op, "indices_out", indices_out, weights.size());
  check_list_length(op, "saved_out", saved_out, weights.size());
  check_list_length(op, "indices_in", indices_in, weights.size());
  check_list_length(op, "values", values, weights.size());
  check_list_length(op, "saved_in", saved_in, weights.size());
  call.weights(weights, Kind::Moves);
  for (size_t t = 0; t < weights.size(); ++t) {
    call.indices("indices_out", indices_out[t], weights[t], t);
    call.values("saved_out", saved_out[t], Values::Weight, weights[t], indices_out[t], t);
    call.indices("indices_in", indices_in[t], weights[t], t);
    call.values("values", values[t], Values::WeightOrFloat32, weights[t], indices_in[t], t);
    call.values("saved_in", saved_in[t], Values::Weight, weights[t], indices_in[t], t);
  }
  for (const Tensor& weight : weights) call.alpha(weight, alpha, delta);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.weight_name(t), weights[t], true);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("indices_out", t), indices_out[t], false);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("saved_out", t), saved_out[t], false);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("indices_in", t), indices_in[t], false);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("values", t), values[t], false);
  for (size_t t = 0; t < weights.size(); ++t) call.overlap.add(call.name("saved_in", t), saved_in[t], true);
  call.overlap.check();
  for (size_t t = 0; t < weights.size(); ++t) {
    call.content("indices_out", indices_out[t], weights[t], t);
    call.content("indices_in", indices_in[t], weights[t], t);
  }
  std::vector<Task> tasks;
  tasks.reserve(weights.size());
  for (size_t t = 0; t < weights.size(); ++t)
    tasks.push_back(switch_task(weights[t], indices_out[t], saved_out[t], indices_in[t], values[t], saved_in[t],
                                alpha, delta, granule));
  run(tasks);
}

Tensor gather(const Tensor& weight, const Tensor& indices, int64_t granule) {
  return gather_list("gather", {weight}, {indices}, granule, false)[0];
}
void scatter_(const Tensor& weight, const Tensor& indices, const Tensor& values, int64_t granule) {
  move_list<Move::Scatter>("scatter_", {weight}, {indices}, {values}, granule, false);
}
void swap_(const Tensor& weight, const Tensor& indices, const Tensor& values, int64_t granule) {
  move_list<Move::Swap>("swap_", {weight}, {indices}, {values}, granule, false);
}
void apply_(const Tensor& weight, const Tensor& indices, const Tensor& values, const Tensor& saved, double alpha,
            bool delta, int64_t granule) {
  apply_list("apply_", {weight}, {indices}, {values}, {saved}, alpha, delta, granule, false);
}
void switch_(const Tensor& weight, const Tensor& indices_out, const Tensor& saved_out, const Tensor& indices_in,
             const Tensor& values, const Tensor& saved_in, double alpha, bool delta, int64_t granule) {
  switch_list("switch_", {weight}, {indices_out}, {saved_out}, {indices_in}, {values}, {saved_in}, alpha, delta,
              granule, false);
}
void scatter_add_(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha, int64_t granule) {
  Call call("scatter_add_", granule, false);
  check_weight(call.op, weight, granule, Kind::Arithmetic);
  call.indices("indices", indices, weight, 0);
  call.values("values", values, Values::WeightOrFloat32, weight, indices, 0);
  call.overlap.add({"weight"}, weight, true);
  call.overlap.add({"indices"}, indices, false);
  call.overlap.add({"values"}, values, false);
  call.overlap.check();
  call.content("indices", indices, weight, 0);
  run(mix_task<false>(weight, indices, values, nullptr, alpha, true, granule));
}

Tensors foreach_gather(const Tensors& weights, const Tensors& indices, int64_t granule) {
  return gather_list("foreach_gather", weights, indices, granule, true);
}
void foreach_scatter_(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
  move_list<Move::Scatter>("foreach_scatter_", weights, indices, values, granule, true);
}
void foreach_swap_(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
  move_list<Move::Swap>("foreach_swap_", weights, indices, values, granule, true);
}
void foreach_apply_(const Tensors& weights, const Tensors& indices, const Tensors& values, const Tensors& saved,
                    double alpha, bool delta, int64_t granule) {
  apply_list("foreach_apply_", weights, indices, values, saved, alpha, delta, granule, true);
}
void foreach_switch_(const Tensors& weights, const Tensors& indices_out, const Tensors& saved_out,
                     const Tensors& indices_in, const Tensors& values, const Tensors& saved_in, double alpha,
                     bool delta, int64_t granule) {
  switch_list("foreach_switch_", weights, indices_out, saved_out, indices_in, values, saved_in, alpha, delta, granule,
              true);
}

void check_indices_op(const Tensor& indices, int64_t limit, int64_t granule) {
  const char* op = "check_indices";
  check_granule(op, granule);
  shira::check_indices(op, {"indices"}, indices);
  SHIRA_CHECK(limit >= 0 && limit % granule == 0, op, ": limit must be a multiple of granule ", granule,
              " and not negative, got ", limit);
  check_indices_content(op, {"indices"}, indices, limit / granule);
}

}  // namespace
}  // namespace shira::cpu

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) {
  if (shira::backend_is_reference()) return;
  m.impl("gather", TORCH_BOX(&shira::cpu::gather));
  m.impl("scatter_", TORCH_BOX(&shira::cpu::scatter_));
  m.impl("swap_", TORCH_BOX(&shira::cpu::swap_));
  m.impl("apply_", TORCH_BOX(&shira::cpu::apply_));
  m.impl("switch_", TORCH_BOX(&shira::cpu::switch_));
  m.impl("scatter_add_", TORCH_BOX(&shira::cpu::scatter_add_));
  m.impl("foreach_gather", TORCH_BOX(&shira::cpu::foreach_gather));
  m.impl("foreach_scatter_", TORCH_BOX(&shira::cpu::foreach_scatter_));
  m.impl("foreach_swap_", TORCH_BOX(&shira::cpu::foreach_swap_));
  m.impl("foreach_apply_", TORCH_BOX(&shira::cpu::foreach_apply_));
  m.impl("foreach_switch_", TORCH_BOX(&shira::cpu::foreach_switch_));
  m.impl("check_indices", TORCH_BOX(&shira::cpu::check_indices_op));
}
