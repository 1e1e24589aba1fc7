// The optimize family on CUDA: adamw_, sgd_ and their foreach_ forms.
//
// One pass, bound by memory: the state streams in whole lines (AdamW: 32 bytes an entry with gradient and index), and
// of the weight's scattered sectors, which are written in part, each is fetched and written back (64 bytes an entry,
// where one has a sector to itself). A thread loads all of its entries' state before it steps the first. A rule's
// numbers (bias corrections, rates) are worked out in double once: on the host, or, where `step` and `lr` are tensors
// that a captured graph must follow, by one thread of each block.
#include "../core/optimize.h"

#include <new>

#include "../dispatch.h"
#include "../optimize_ops.h"
#include "memory.h"

namespace shira::cuda {
namespace {

constexpr int kItems = 4;
constexpr int kTile = kThreads * kItems;

// How many buffers beside the gradient a rule steps.
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

// Where step and lr lie on the device, the kernel makes the rule; the one made here is not read, and must not follow
// the device's pointers.
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
  void* state[3];  // the master and, where the rule has them, its averages
  const void* grad;
  int64_t limit;
  Granule granule;
  bool dense;  // the gradient has the weight's shape
};

template <typename R, typename W, typename G>
struct Step {
  using Row = StepRow;
  using Rule = R;
  struct Scalars {
    Rule rule;  // where the numbers are given with the call
    typename Rule::Options options;
    bool in_tensors;
  };
  using S = core::StateOf<W>;
  using C = typename W::Compute;
  using State = typename S::Bits;

  static int64_t tiles(const Row& row) { return (row.indices.count * row.granule.units + kTile - 1) / kTile; }

  static __device__ void tile(const Scalars& scalars, const Row& row, int64_t tile) {
    if (!scalars.in_tensors) return step(scalars.rule, row, tile);
    SHIRA_SHARED(room, (sizeof(Rule) + 7) / 8, uint64_t);
    if (threadIdx.x == 0) new (static_cast<void*>(&room[0])) Rule(scalars.options);
    __syncthreads();
    step(*reinterpret_cast<const Rule*>(&room[0]), row, tile);
  }

  static __device__ __forceinline__ void step(const Rule& rule, const Row& row, int64_t tile) {
    const int64_t total = row.indices.count * row.granule.units, begin = tile * kTile + threadIdx.x;
    int64_t at[kItems];  // the entry of the weight, or below 0: nothing to do
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int64_t entry = begin + k * kThreads;
      at[k] = -1;
      if (entry < total) {
        int64_t number, offset;
        row.granule.split(entry, number, offset);
        const int64_t index = row.indices[number];
        if (within(index, row.limit)) at[k] = index * row.granule.units + offset;
      }
    }
    State state[kItems][Rule::kStates];
    typename G::Bits grad[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (at[k] < 0) continue;
      const int64_t entry = begin + k * kThreads;
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s)
        state[k][s] = load_stream(static_cast<const State*>(row.state[s]) + entry);
      grad[k] = load_stream(static_cast<const typename G::Bits*>(row.grad) + (row.dense ? at[k] : entry));
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      if (at[k] < 0) continue;
      const int64_t entry = begin + k * kThreads;
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
void start(const std::vector<StepRow>& rows, const typename Work::Rule::Options& options, cudaStream_t stream) {
  const bool tensors = in_tensors(options);
  launch_list<Work>({typename Work::Rule(tensors ? placeholder(options) : options), options, tensors}, rows, stream);
}

// `states`: the masters, and the lists of the rule's own buffers.
template <template <typename> class Rule, typename Options>
void step(const Tensors& weights, const Tensors& indices, const std::vector<const Tensors*>& states,
          const Tensors& grads, const Options& options, int64_t granule) {
  if (weights.empty()) return;
  const Device device(weights[0]);
  Groups<StepRow, void (*)(const std::vector<StepRow>&, const Options&, cudaStream_t)> launches;
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
  launches.launch(options, device.stream);
}

struct Cuda {
  static void content(const char*, Name, const Tensor&, int64_t) {}  // guarded where it is used

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

STABLE_TORCH_LIBRARY_IMPL(SHIRA_LIB, SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::OptimizeOps<shira::cuda::Cuda>::implement(m);
}
