// The optimize family on CUDA: adamw_, sgd_ and their foreach_ forms.
//
// One pass, bound by memory: the state streams in whole lines (AdamW: 32 bytes per entry with gradient and index), and
// the weight's scattered sectors, which are written in part, are each fetched and written back (64 bytes per entry, if
// it has a sector to itself). A thread loads the state of all its entries before it steps the first. A rule's numbers
// (bias corrections, rates) are computed in double once: on the host or, if `step` and `lr` are tensors that a captured
// graph must follow, by a one-thread launch before the step.
#include "../core/optimize.h"

#include "../dispatch.h"
#include "../ops/optimize.h"
#include "memory.h"

namespace shira::cuda {
namespace {

constexpr int kItems = 4;
constexpr int kTile = kThreads * kItems;

// How many buffers a rule steps, not counting the gradient.
template <typename C>
struct PlainSgd : core::Sgd<C> {
  using Options = core::SgdOptions;
  static constexpr int kStates = 1;
  using core::Sgd<C>::Sgd;
};
template <typename C>
struct MomentumSgd : core::Sgd<C> {
  using Options = core::SgdOptions;
  static constexpr int kStates = 2;
  using core::Sgd<C>::Sgd;
};
template <typename C>
struct Adamw : core::Adamw<C> {
  using Options = core::AdamwOptions;
  static constexpr int kStates = 3;
  using core::Adamw<C>::Adamw;
};

bool in_tensors(const core::SgdOptions& options) { return options.lr.at != nullptr; }
bool in_tensors(const core::AdamwOptions& options) { return options.step.at != nullptr; }

// If step and lr lie on the device, the device makes the rule. The one made here is not read, and must not dereference
// device pointers.
core::SgdOptions placeholder(core::SgdOptions options) {
  options.lr = {0};
  return options;
}
core::AdamwOptions placeholder(core::AdamwOptions options) {
  options.step = {1};
  options.lr = {0};
  return options;
}

struct StepRow {
  void* weight;
  Indices indices;
  void* state[3];  // the master and the rule's averages, if any
  const void* grad;
  int64_t limit;
  Granule granule;
  bool dense;            // the gradient has the weight's shape
  int32_t tile = kTile;  // entries per block

  int64_t entries() const { return indices.count * granule.units; }
};

// A rule whose step and lr lie on the device is made once, by its own launch: powers in double take longer than a
// block's share of a step.
template <typename R>
struct MakeRow {
  typename R::Options options;
  uint32_t* made;
};
template <typename R>
struct Make {
  using Row = MakeRow<R>;
  struct Scalars {};
  static constexpr int kWords = sizeof(R) / sizeof(uint32_t);
  static_assert(sizeof(R) % sizeof(uint32_t) == 0 && std::is_trivially_copyable_v<R>);

  static int64_t tiles(const Row&) { return 1; }
  static __device__ void tile(const Scalars&, const Row& row, int64_t) {
    if (threadIdx.x > 0) return;
    const R rule(row.options);
    uint32_t word[kWords];
    memcpy(word, &rule, sizeof(R));
#pragma unroll
    for (int k = 0; k < kWords; ++k) store_stream(row.made + k, word[k]);
  }
  static __device__ __forceinline__ void read(const uint32_t* made, R& rule) {
    uint32_t word[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k) word[k] = load_cached(made + k);
    memcpy(&rule, word, sizeof(R));
  }
};

template <typename R, typename W, typename G>
struct Step {
  using Row = StepRow;
  using Rule = R;
  struct Scalars {
    Rule rule;             // if the numbers are given with the call
    const uint32_t* made;  // else the rule on the device
  };
  using S = core::StateOf<W>;
  using C = typename W::Compute;
  using State = typename S::Bits;

  static int64_t tiles(const Row& row) { return (row.entries() + row.tile - 1) / row.tile; }

  static __device__ void tile(const Scalars& scalars, const Row& row, int64_t tile) {
    Rule rule = scalars.rule;
    if (scalars.made != nullptr) Make<Rule>::read(scalars.made, rule);
    const int64_t total = row.indices.count * row.granule.units, begin = tile * row.tile, end = begin + row.tile;
    const Items<kItems> items(row.indices, row.granule, begin, end < total ? end : total);
    int64_t at[kItems];  // the entry of the weight, or -1 if there is nothing to do
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      at[k] =
          items.is(k) && within(items.index[k], row.limit) ? items.index[k] * row.granule.units + items.offset[k] : -1;
    State state[kItems][Rule::kStates];
    typename G::Bits grad[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (at[k] < 0) continue;
      const int64_t entry = items.at(k);
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s)
        state[k][s] = load_stream(static_cast<const State*>(row.state[s]) + entry);
      grad[k] = load_stream(static_cast<const typename G::Bits*>(row.grad) + (row.dense ? at[k] : entry));
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (at[k] < 0) continue;
      const int64_t entry = items.at(k);
      const C g = static_cast<C>(G::load(grad[k]));
      C value[Rule::kStates];
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s) value[s] = S::load(state[k][s]);
      if constexpr (Rule::kStates == 1) rule(value[0], g);
      if constexpr (Rule::kStates == 2) rule(value[0], value[1], g);
      if constexpr (Rule::kStates == 3) rule(value[0], value[1], value[2], g);
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s)
        store_stream(static_cast<State*>(row.state[s]) + entry, S::store(value[s]));
      store_weight(static_cast<typename W::Bits*>(row.weight) + at[k], W::store(value[0]));
    }
  }
};

template <typename Work>
void start(std::vector<StepRow>& rows, const Tensor& like, const typename Work::Rule::Options& options,
           cudaStream_t stream) {
  using Rule = typename Work::Rule;
  int64_t entries = 0;
  for (const StepRow& row : rows) entries += row.entries();
  for (StepRow& row : rows) row.tile = tile_of<kItems>(entries);
  if (!in_tensors(options)) return launch_list<Work>({Rule(options), nullptr}, rows, stream);
  const Tensor room = torch::stable::new_empty(like, {Make<Rule>::kWords}, ScalarType::Int);
  auto* const made = address<uint32_t>(room);
  launch_one<Make<Rule>>({}, {options, made}, stream);
  launch_list<Work>({Rule(placeholder(options)), made}, rows, stream);
}

// `states`: the masters, then the lists of the rule's own buffers.
template <template <typename> class Rule, typename Options>
void step(const Tensors& weights, const Tensors& indices, const std::vector<const Tensors*>& states,
          const Tensors& grads, const Options& options, int64_t granule) {
  if (weights.empty()) return;
  const Device device(weights[0]);
  Groups<StepRow, void (*)(std::vector<StepRow>&, const Tensor&, const Options&, cudaStream_t)> launches;
  for (size_t t = 0; t < weights.size(); ++t) {
    const Tensor &weight = weights[t], &grad = grads[t];
    StepRow row{address<void>(weight),
                indices_of(indices[t]),
                {},
                address<const void>(grad),
                weight.numel() / granule,
                Granule::of(granule),
                is_dense(grad, weight, indices[t].numel() * granule)};
    for (size_t s = 0; s < states.size(); ++s) row.state[s] = address<void>((*states[s])[t]);
    with_dtypes(weight.scalar_type(), grad.scalar_type(), [&](auto w, auto g) {
      using W = typename decltype(w)::type;
      using G = typename decltype(g)::type;
      launches.add(start<Step<Rule<typename W::Compute>, W, G>>, row);
    });
  }
  launches.launch(weights[0], options, device.stream);
}

struct Cuda {
  static void content(const char*, Name, const Tensor&, int64_t) {}  // each access is guarded instead

  static void adamw(const Tensors& weights, const Tensors& indices, const Tensors& masters, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& grads, const core::AdamwOptions& options,
                    int64_t granule) {
    step<Adamw>(weights, indices, {&masters, &exp_avgs, &exp_avg_sqs}, grads, options, granule);
  }
  static void sgd(const Tensors& weights, const Tensors& indices, const Tensors& masters,
                  const Tensors& momentum_buffers, const Tensors& grads, const core::SgdOptions& options,
                  int64_t granule) {
    if (momentum_buffers.empty())
      step<PlainSgd>(weights, indices, {&masters}, grads, options, granule);
    else
      step<MomentumSgd>(weights, indices, {&masters, &momentum_buffers}, grads, options, granule);
  }
};

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::OptimizeOps<shira::cuda::Cuda>::implement(m);
}
