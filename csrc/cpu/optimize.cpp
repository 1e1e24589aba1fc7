// The optimize family on the CPU: adamw_, sgd_ and their foreach_ forms.
//
// One pass: a block of state is stepped where it lies, in contiguous loops, and then its weights are written. A whole
// model is one walk.
#include "../core/optimize.h"

#include <array>

#include "../dispatch.h"
#include "../ops/optimize.h"
#include "vector.h"
#include "walk.h"

namespace shira::cpu {
namespace {

// Weights of a block: as many as leave room in L1. Nothing waits for the writes, so the store buffer alone keeps their
// lines coming: long runs without prefetching measured 9 % faster than 512 at a time with it.
constexpr int64_t kBlockBytes = 8192;

struct StepTask {
  void (*chunk)(const StepTask&, int64_t begin, int64_t end);
  char* weight;
  const void* indices;
  std::array<void*, 3> state;  // the master and the rule's averages, if any
  const char* grad;
  const void* rule;
  int64_t granule;
  int64_t total;
};

// How many buffers a rule steps, not counting the gradient.
template <typename C>
struct PlainSgd : core::Sgd<C> {
  static constexpr int kStates = 1;
  using core::Sgd<C>::Sgd;
};
template <typename C>
struct MomentumSgd : core::Sgd<C> {
  static constexpr int kStates = 2;
  using core::Sgd<C>::Sgd;
};
template <typename C>
struct Adamw : core::Adamw<C> {
  static constexpr int kStates = 3;
  using core::Adamw<C>::Adamw;
};

template <typename W, typename G, typename I, typename Rule, bool dense>
void step_chunk(const StepTask& task, int64_t begin, int64_t end) {
  using S = core::StateOf<W>;
  using SB = typename S::Bits;
  using WB = typename W::Bits;
  using GB = typename G::Bits;
  using C = typename W::Compute;
  constexpr int64_t kBlock = kBlockBytes / static_cast<int64_t>(sizeof(WB));
  const Rule rule = *static_cast<const Rule*>(task.rule);
  const I* const indices = static_cast<const I*>(task.indices);
  WB stepped[kBlock];
  GB gathered[dense ? kBlock : 1];
  for (int64_t from = begin; from < end; from += kBlock) {
    const int64_t to = std::min(end, from + kBlock);
    const GB* grad = gathered;
    if constexpr (dense)
      walk<sizeof(GB), Fetch::Read>(task.grad, indices, task.granule, from, to, task.total, from == begin,
                                    [&](int64_t offset, int64_t at, int64_t length) {
                                      memcpy(gathered + (at - from), task.grad + offset, length * sizeof(GB));
                                    });
    else
      grad = reinterpret_cast<const GB*>(task.grad) + from;
    SB* const p = static_cast<SB*>(task.state[0]) + from;
    SB* const m = Rule::kStates > 1 ? static_cast<SB*>(task.state[1]) + from : nullptr;
    SB* const v = Rule::kStates > 2 ? static_cast<SB*>(task.state[2]) + from : nullptr;
    vector_loop(to - from, [=, &stepped](int64_t i) {
      const C g = static_cast<C>(G::load(grad[i]));
      C master = S::load(p[i]);
      if constexpr (Rule::kStates == 1) {
        rule(master, g);
      } else {
        C average = S::load(m[i]);
        if constexpr (Rule::kStates == 2) {
          rule(master, average, g);
        } else {
          C square = S::load(v[i]);
          rule(master, average, square, g);
          v[i] = S::store(square);
        }
        m[i] = S::store(average);
      }
      p[i] = S::store(master);
      stepped[i] = W::store(master);
    });
    walk<sizeof(WB), Fetch::None>(task.weight, indices, task.granule, from, to, task.total, false,
                                  [&](int64_t offset, int64_t at, int64_t length) {
                                    memcpy(task.weight + offset, stepped + (at - from), length * sizeof(WB));
                                  });
  }
}

// `averages`: the lists of the rule's own buffers.
template <template <typename> class Rule, typename Options, size_t n>
void step(const Tensors& weights, const Tensors& indices, const Tensors& masters,
          const std::array<const Tensors*, n>& averages, const Tensors& grads, const Options& options,
          int64_t granule) {
  static_assert(Rule<float>::kStates == n + 1);
  const Rule<float> single(options);
  const Rule<double> twice(options);
  std::vector<StepTask> tasks;
  tasks.reserve(weights.size());
  for (size_t t = 0; t < weights.size(); ++t) {
    const Tensor &weight = weights[t], &grad = grads[t];
    StepTask task{};
    task.weight = static_cast<char*>(weight.data_ptr());
    task.indices = indices[t].const_data_ptr();
    task.state[0] = masters[t].data_ptr();
    for (size_t k = 0; k < n; ++k) task.state[k + 1] = (*averages[k])[t].data_ptr();
    task.grad = static_cast<const char*>(grad.const_data_ptr());
    task.granule = granule;
    task.total = indices[t].numel() * granule;
    const bool dense = is_dense(grad, weight, task.total);
    with_dtypes(weight.scalar_type(), grad.scalar_type(), [&](auto w, auto g) {
      using W = typename decltype(w)::type;
      using G = typename decltype(g)::type;
      using R = Rule<typename W::Compute>;
      if constexpr (std::is_same_v<R, Rule<float>>)
        task.rule = &single;
      else
        task.rule = &twice;
      with_index(indices[t].scalar_type(), [&](auto index) {
        using I = typename decltype(index)::type;
        task.chunk = dense ? step_chunk<W, G, I, R, true> : step_chunk<W, G, I, R, false>;
      });
    });
    tasks.push_back(task);
  }
  run(tasks);
}

struct Cpu {
  static void content(const char* op, Name name, const Tensor& indices, int64_t limit) {
    check_indices_content(op, name, indices, limit);
  }
  static void adamw(const Tensors& weights, const Tensors& indices, const Tensors& masters, const Tensors& exp_avgs,
                    const Tensors& exp_avg_sqs, const Tensors& grads, const core::AdamwOptions& options,
                    int64_t granule) {
    step<Adamw>(weights, indices, masters, std::array{&exp_avgs, &exp_avg_sqs}, grads, options, granule);
  }
  static void sgd(const Tensors& weights, const Tensors& indices, const Tensors& masters,
                  const Tensors& momentum_buffers, const Tensors& grads, const core::SgdOptions& options,
                  int64_t granule) {
    if (momentum_buffers.empty())
      step<PlainSgd>(weights, indices, masters, std::array<const Tensors*, 0>{}, grads, options, granule);
    else
      step<MomentumSgd>(weights, indices, masters, std::array{&momentum_buffers}, grads, options, granule);
  }
};

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (!shira::backend_is_reference()) shira::OptimizeOps<shira::cpu::Cpu>::implement(m);
}
