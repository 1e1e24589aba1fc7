// The switch family on CUDA: gather, scatter_, swap_, apply_, switch_, scatter_add_, their foreach_ forms, and
// check_indices.
//
// Memory bounds these ops: at 1 % a bfloat16 weight is touched in 15 % of its 32-byte sectors, each read and written
// once, beside three or four streams of nnz entries. A kernel takes little longer than touching those sectors alone if
// it keeps enough of them in flight, and that decides everything here:
//   - A thread has kItems units and loads all their indices, then all their sectors, before the first store: two
//     latencies per tile instead of two per unit. 2048 threads per multiprocessor with 4 sectors each are 256 KB in
//     flight, ten times what 4.8 TB/s at 700 ns needs, so occupancy may halve without loss.
//   - A thread's items are kThreads apart (unit = tile + k * kThreads + thread): neighbouring threads have neighbouring
//     indices, so streams coalesce to whole lines and entries of one sector are fetched by one request.
//   - Granules move in the widest accesses, up to 16 bytes, that their size and every address allow.
//   - A tile is kThreads * kItems units of any one tensor, so a model of large and small weights is balanced.
// No kernel waits for another, and only check_indices synchronises with the host. An index that is out of range is
// skipped where it is used (gather gives 0), so that content needs no pass of its own.
#include "../dispatch.h"
#include "../ops/switch.h"
#include "indices.h"

namespace shira::cuda {
namespace {

constexpr int kItems = 4;
constexpr int kTile = kThreads * kItems;

// How a base entry and a value combine: as bits of any dtype, or by arithmetic.
template <int kUnit>
struct Copy {
  using Base = Pack<Unit<kUnit>, 1>;
  using Value = Base;
  struct Strength {
    Strength() = default;
    Strength(double, bool) {}
  };
  static __device__ __forceinline__ Base mix(const Base&, const Value& value, const Strength&) { return value; }
};

template <typename W, typename V, int kEntries>
struct Mix {
  using Base = Pack<typename W::Bits, kEntries>;
  using Value = Pack<typename V::Bits, kEntries>;
  struct Strength {
    typename W::Compute alpha;  // rounded before anything depends on it
    core::Rule rule;            // a runtime value, not a template argument: it is the same for a whole launch
    Strength() = default;
    Strength(double alpha, bool delta)
        : alpha(static_cast<typename W::Compute>(alpha)), rule(core::rule_of(this->alpha, delta)) {}
  };
  static __device__ __forceinline__ Base mix(const Base& base, const Value& value, const Strength& strength) {
    Base mixed;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const auto b = base.entry[e];
      const auto v = value.entry[e];
      switch (strength.rule) {
        case core::Rule::Keep: mixed.entry[e] = b; break;
        case core::Rule::Overwrite: mixed.entry[e] = core::convert<W, V>(v); break;
        case core::Rule::Blend: mixed.entry[e] = core::mix<W, V, core::Rule::Blend>(b, v, strength.alpha); break;
        case core::Rule::Delta: mixed.entry[e] = core::mix<W, V, core::Rule::Delta>(b, v, strength.alpha); break;
      }
    }
    return mixed;
  }
};

// One tensor of a walk over one list.
struct WalkRow {
  void* weight;
  Indices indices;
  void* values;
  void* saved;
  int64_t limit;  // granules in the weight
  Granule granule;
  int32_t tile = kTile;  // units per block

  int64_t units() const { return indices.count * granule.units; }
};

enum class Move { Gather, Scatter, Swap, Apply };

// Gather: values = weight[i], or saved = weight[i] where there are no values. Scatter: weight[i] = values. Swap: both.
// Apply: saved = weight[i], then weight[i] = mix(saved, values); without saved (scatter_add_) the base is not kept.
template <Move move, typename CellOf>
struct Walk {
  using Row = WalkRow;
  using Cell = CellOf;
  using Scalars = typename Cell::Strength;
  using Base = typename Cell::Base;
  using Value = typename Cell::Value;

  static int64_t tiles(const Row& row) { return (row.units() + row.tile - 1) / row.tile; }

  static __device__ void tile(const Scalars& strength, const Row& row, int64_t tile) {
    const int64_t total = row.indices.count * row.granule.units, begin = tile * row.tile, end = begin + row.tile;
    const Items<kItems> items(row.indices, row.granule, begin, end < total ? end : total);
    int64_t at[kItems];  // the unit of the weight, or -1 if there is nothing to do
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      at[k] =
          items.is(k) && within(items.index[k], row.limit) ? items.index[k] * row.granule.units + items.offset[k] : -1;
    Base base[kItems];
    Value value[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (at[k] < 0) continue;
      if constexpr (move != Move::Scatter) base[k] = Base::weight(row.weight, at[k]);
      if constexpr (move != Move::Gather) value[k] = Value::stream(row.values, items.at(k));
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t unit = items.at(k);
      if (at[k] < 0) {
        if constexpr (move == Move::Gather)
          if (items.is(k) && row.values != nullptr) Base{}.to_stream(row.values, unit);
        continue;
      }
      if constexpr (move == Move::Gather) base[k].to_stream(row.values != nullptr ? row.values : row.saved, unit);
      if constexpr (move == Move::Swap) base[k].to_stream(row.values, unit);
      if constexpr (move == Move::Scatter || move == Move::Swap) value[k].to_weight(row.weight, at[k]);
      if constexpr (move == Move::Apply) {
        if (row.saved != nullptr) base[k].to_stream(row.saved, unit);
        Cell::mix(base[k], value[k], strength).to_weight(row.weight, at[k]);
      }
    }
  }
};

// ---- switch_: one pass over two sorted lists -----------------------------------------------------------
//
// The merged list of both is cut into equal tiles ("merge path"), whatever the two have in common. A block finds its
// two cuts by a 32-way search (four rounds for a million entries, where bisection takes twenty dependent loads), and
// loads both segments into shared memory. There each granule of one list is looked up in the other: one that comes in
// takes its base from what goes out, if it is there too, and one that only goes out is restored.

struct SwitchRow {
  void* weight;
  Indices out;
  const void* saved_out;
  Indices in;
  const void* values;
  void* saved_in;
  int64_t limit;
  Granule granule;
  int32_t elements;  // granules of the merged list in a tile: as many as make kTile units, at least one
  int32_t parts;     // tiles that share one granule of more units than that

  int64_t merged() const { return (out.count + in.count + elements - 1) / elements; }
};

// How many of the first `diagonal` granules of the merged list come from `out`; if both lists have a granule, out's is
// first. Called by a whole warp, whose lanes get one answer. It is within both lists whatever they hold: at most as
// many lanes can say yes as have probes below `high`.
__device__ __forceinline__ int64_t cut(const Indices& out, const Indices& in, int64_t diagonal) {
  int64_t low = diagonal > in.count ? diagonal - in.count : 0, high = diagonal < out.count ? diagonal : out.count;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  while (low < high) {
    const int64_t step = (high - low + 31) / 32, probe = low + (lane + 1) * step - 1;
    // Along the lanes out[probe] rises and in's entry falls, so the lanes that say yes are the first ones.
    const bool before = probe < high && out.cached(probe) <= in.cached(diagonal - 1 - probe);
    const int64_t found = __popc(__ballot_sync(0xFFFFFFFFu, before)), bound = low + (found + 1) * step - 1;
    low += found * step;
    if (bound < high) high = bound;
  }
  return low;
}

// The first place in a sorted segment of shared memory whose entry is not below x.
__device__ __forceinline__ int find(const int64_t* segment, int count, int64_t x) {
  int low = 0;
  while (count > 0) {
    const int half = count / 2;
    if (segment[low + half] < x) {
      low += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return low;
}

template <typename CellOf>
struct Exchange {
  using Row = SwitchRow;
  using Cell = CellOf;
  using Scalars = typename Cell::Strength;
  using Base = typename Cell::Base;
  using Value = typename Cell::Value;

  static int64_t tiles(const Row& row) { return row.merged() * row.parts; }

  static __device__ void tile(const Scalars& strength, const Row& row, int64_t tile) {
    SHIRA_SHARED(cuts, 2, int64_t);
    SHIRA_SHARED(segments, kTile + 2, int64_t);
    const int32_t part = static_cast<int32_t>(tile) % row.parts;
    const int64_t begin = static_cast<int64_t>(static_cast<int32_t>(tile) / row.parts) * row.elements;
    const int64_t all = row.out.count + row.in.count;
    const int64_t end = begin + row.elements < all ? begin + row.elements : all;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < 64) {
      const int64_t found = cut(row.out, row.in, thread < 32 ? begin : end);
      if (thread % 32 == 0) cuts[thread / 32] = found;
    }
    __syncthreads();
    // If the lists are not sorted, the cuts may cross: what is not between them is left alone.
    const int64_t out_begin = cuts[0], in_begin = begin - out_begin;
    const int n_out = clamp(cuts[1] - out_begin, row.elements);
    const int n_in = clamp(end - cuts[1] - in_begin, row.elements - n_out);
    // A cut may part a granule's twins: out also needs the one before its first, in the one after its last.
    const int before = out_begin > 0, after = in_begin + n_in < row.in.count;
    int64_t* const out = segments;
    int64_t* const in = segments + before + n_out;
    for (int i = thread; i < before + n_out; i += kThreads) out[i] = row.out[out_begin - before + i];
    for (int i = thread; i < n_in + after; i += kThreads) in[i] = row.in[in_begin + i];
    __syncthreads();

    const int64_t first_unit = int64_t{part} * kTile, left = row.granule.units - first_unit;
    const Granule share = row.parts == 1 ? row.granule : Granule{left < kTile ? left : kTile, -1};
    const int64_t items = (n_out + n_in) * share.units;

    // `to` is the unit of the weight, or -1 if there is nothing to do. `enters`: the granule comes in.
    int64_t to[kItems], unit[kItems];
    bool enters[kItems];
    Base base[kItems];
    Value value[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t item = thread + k * kThreads;
      to[k] = -1;
      if (item >= items) continue;
      int64_t element, offset;
      share.split(item, element, offset);
      offset += first_unit;
      enters[k] = element < n_in;
      const int own = static_cast<int>(enters[k] ? element : element - n_in + before);
      const int64_t index = enters[k] ? in[own] : out[own];
      if (!within(index, row.limit)) continue;
      const int64_t* const other = enters[k] ? out : in;
      const int count = enters[k] ? before + n_out : n_in + after;
      const int twin = find(other, count, index);
      const bool twins = twin < count && other[twin] == index;
      if (!enters[k] && twins) continue;  // its twin, which comes in, writes
      to[k] = index * row.granule.units + offset;
      unit[k] = (enters[k] ? in_begin + own : out_begin - before + own) * row.granule.units + offset;
      if (!enters[k])
        base[k] = Base::stream(row.saved_out, unit[k]);
      else if (twins)
        base[k] = Base::stream(row.saved_out, (out_begin - before + twin) * row.granule.units + offset);
      else
        base[k] = Base::weight(row.weight, to[k]);
      if (enters[k]) value[k] = Value::stream(row.values, unit[k]);
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (to[k] < 0) continue;
      if (enters[k]) {
        base[k].to_stream(row.saved_in, unit[k]);
        base[k] = Cell::mix(base[k], value[k], strength);
      }
      base[k].to_weight(row.weight, to[k]);
    }
  }

 private:
  static __device__ __forceinline__ int clamp(int64_t n, int most) {
    return n < 0 ? 0 : n > most ? most : static_cast<int>(n);
  }
};

// ---- the walks, as csrc/ops/switch.h calls them -----------------------------------------------------------

template <typename Work>
void start(std::vector<typename Work::Row>& rows, double alpha, bool delta, cudaStream_t stream) {
  if constexpr (std::is_same_v<typename Work::Row, WalkRow>) {
    int64_t units = 0;
    for (const WalkRow& row : rows) units += row.units();
    for (WalkRow& row : rows) row.tile = tile_of<kItems>(units);
  }
  launch_list<Work>(typename Work::Scalars(alpha, delta), rows, stream);
}
template <typename Row>
using Start = Groups<Row, void (*)(std::vector<Row>&, double alpha, bool delta, cudaStream_t)>;

// f(Type<Cell>{}, cells per granule) for the widest cell of arithmetic.
template <typename F>
auto with_mix(const Tensor& weight, const Tensor& values, int64_t granule, int64_t unit, F&& f) {
  return with_dtypes(weight.scalar_type(), values.scalar_type(), [&](auto w, auto v) {
    using W = typename decltype(w)::type;
    using V = typename decltype(v)::type;
    constexpr int kBytes = sizeof(typename W::Bits), kWide = kBytes == 8 ? 1 : 16 / kBytes;
    return unit == 16 ? f(Type<Mix<W, V, kWide>>{}, granule / kWide) : f(Type<Mix<W, V, 1>>{}, granule);
  });
}

int64_t granule_bytes(const Tensor& weight, int64_t granule) {
  return granule * static_cast<int64_t>(weight.element_size());
}

core::Rule rule_for(const Tensor& weight, double alpha, bool delta) {
  return core::rule_of(weight.scalar_type() == ScalarType::Double ? alpha : static_cast<float>(alpha), delta);
}
// An overwrite at alpha 1 is a move, of any dtype.
bool is_copy(const Tensor& weight, const Tensor& values, core::Rule rule) {
  return rule == core::Rule::Overwrite && values.scalar_type() == weight.scalar_type();
}

struct Cuda {
  static void content(const char*, Name, const Tensor&, int64_t) {}  // each access is guarded instead

  static void check(const char* op, const Tensor& indices, int64_t limit) {
    check_content(op, {"indices"}, indices, limit, Device(indices).stream);
  }

  template <Move move>
  static void copies(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    if (weights.empty()) return;
    const Device device(weights[0]);
    Start<WalkRow> launches;
    for (size_t t = 0; t < weights.size(); ++t)
      add_copy<move>(launches, weights[t], indices[t], &values[t], nullptr, granule);
    launches.launch(1.0, false, device.stream);
  }
  static void gather(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    copies<Move::Gather>(weights, indices, values, granule);
  }
  static void scatter(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    copies<Move::Scatter>(weights, indices, values, granule);
  }
  static void swap(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    copies<Move::Swap>(weights, indices, values, granule);
  }

  static void apply(const Tensors& weights, const Tensors& indices, const Tensors& values, const Tensors& saved,
                    double alpha, bool delta, int64_t granule) {
    if (weights.empty()) return;
    const Device device(weights[0]);
    Start<WalkRow> launches;
    for (size_t t = 0; t < weights.size(); ++t) {
      const core::Rule rule = rule_for(weights[t], alpha, delta);
      if (rule == core::Rule::Keep)
        add_copy<Move::Gather>(launches, weights[t], indices[t], nullptr, &saved[t], granule);
      else if (is_copy(weights[t], values[t], rule))
        add_copy<Move::Apply>(launches, weights[t], indices[t], &values[t], &saved[t], granule);
      else
        add_mix(launches, weights[t], indices[t], values[t], &saved[t], granule);
    }
    launches.launch(alpha, delta, device.stream);
  }

  static void add(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha, int64_t granule) {
    if (rule_for(weight, alpha, true) == core::Rule::Keep) return;
    const Device device(weight);
    Start<WalkRow> launches;
    add_mix(launches, weight, indices, values, nullptr, granule);
    launches.launch(alpha, true, device.stream);
  }

  static void exchange(const Tensors& weights, const Tensors& indices_out, const Tensors& saved_out,
                       const Tensors& indices_in, const Tensors& values, const Tensors& saved_in, double alpha,
                       bool delta, int64_t granule) {
    if (weights.empty()) return;
    const Device device(weights[0]);
    Start<SwitchRow> launches;
    for (size_t t = 0; t < weights.size(); ++t) {
      const Tensor& weight = weights[t];
      SwitchRow row{address<void>(weight),
                    indices_of(indices_out[t]),
                    address<const void>(saved_out[t]),
                    indices_of(indices_in[t]),
                    address<const void>(values[t]),
                    address<void>(saved_in[t]),
                    weight.numel() / granule,
                    {},
                    0,
                    0};
      const auto add = [&](auto cell, int64_t units) {
        row.granule = Granule::of(units);
        row.elements = static_cast<int32_t>(std::max<int64_t>(1, kTile / units));
        row.parts = static_cast<int32_t>((units + kTile - 1) / kTile);
        launches.add(start<Exchange<typename decltype(cell)::type>>, row);
      };
      const int64_t bytes = granule_bytes(weight, granule);
      const int64_t unit = widest_unit(bytes, row.weight, row.saved_out, row.values, row.saved_in);
      if (is_copy(weight, values[t], rule_for(weight, alpha, delta)))
        with_unit(unit, [&](auto width) { add(Type<Copy<width>>{}, bytes / width); });
      else
        with_mix(weight, values[t], granule, unit, add);
    }
    launches.launch(alpha, delta, device.stream);
  }

  static void* place(const Tensor* tensor, bool written) {
    if (tensor == nullptr) return nullptr;
    return written ? address<void>(*tensor) : const_cast<void*>(address<const void>(*tensor));
  }
  static WalkRow walk_row(Move move, const Tensor& weight, const Tensor& indices, const Tensor* values,
                          const Tensor* saved, int64_t granule) {
    return {place(&weight, move != Move::Gather),
            indices_of(indices),
            place(values, move == Move::Gather || move == Move::Swap),
            place(saved, true),
            weight.numel() / granule,
            {}};
  }
  template <Move move>
  static void add_copy(Start<WalkRow>& launches, const Tensor& weight, const Tensor& indices, const Tensor* values,
                       const Tensor* saved, int64_t granule) {
    WalkRow row = walk_row(move, weight, indices, values, saved, granule);
    const int64_t bytes = granule_bytes(weight, granule);
    with_unit(widest_unit(bytes, row.weight, row.values, row.saved), [&](auto width) {
      row.granule = Granule::of(bytes / width);
      launches.add(start<Walk<move, Copy<width>>>, row);
    });
  }
  static void add_mix(Start<WalkRow>& launches, const Tensor& weight, const Tensor& indices, const Tensor& values,
                      const Tensor* saved, int64_t granule) {
    WalkRow row = walk_row(Move::Apply, weight, indices, &values, saved, granule);
    const int64_t unit = widest_unit(granule_bytes(weight, granule), row.weight, row.values, row.saved);
    with_mix(weight, values, granule, unit, [&](auto cell, int64_t units) {
      row.granule = Granule::of(units);
      launches.add(start<Walk<Move::Apply, typename decltype(cell)::type>>, row);
    });
  }
};

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::SwitchOps<shira::cuda::Cuda>::implement(m);
}
