// The ops of the diff family, once for every compiled backend: everything is checked before the first write, then the
// backend compares, refreshes the snapshots and returns what it found.
//
// A backend has a static function over lists of one length, whose arguments are already checked. The sizes of its
// results depend on the content, so it may synchronise:
//   diff(op, snapshots, weights, granule, before) -> (indices, values)
#pragma once
#include <tuple>

#include "../checks.h"

namespace shira {

template <typename Backend>
struct DiffOps {
  using Found = std::tuple<Tensors, Tensors>;

  static Found diff_list(Call call, const Tensors& snapshots, const Tensors& weights, bool before) {
    call.length("snapshots", snapshots, weights);
    call.weights(weights, Kind::Moves);
    for (size_t t = 0; t < weights.size(); ++t) {
      const Name name = call.name("snapshot", "snapshots", t), owner = call.weight_name(t);
      const Tensor &snapshot = snapshots[t], &weight = weights[t];
      check_device(call.op, name, snapshot, weight, owner);
      check_dtype(call.op, name, snapshot, Values::Weight, weight, owner);
      SHIRA_CHECK(same_shape(snapshot, weight), call.op, ": ", name, " must have ", owner, "'s shape ",
                  list_text(weight.sizes()), ", got shape ", list_text(snapshot.sizes()));
      check_contiguous(call.op, name, snapshot);
    }
    call.memory("snapshot", "snapshots", snapshots, true);
    call.memory("weight", "weights", weights, false);
    call.overlap.check();
    return Backend::diff(call.op, snapshots, weights, call.granule, before);
  }

  static std::tuple<Tensor, Tensor> diff_(const Tensor& snapshot, const Tensor& weight, int64_t granule, bool before) {
    const auto [indices, values] = diff_list({"diff_", granule, false}, {snapshot}, {weight}, before);
    return {indices[0], values[0]};
  }
  static Found foreach_diff_(const Tensors& snapshots, const Tensors& weights, int64_t granule, bool before) {
    return diff_list({"foreach_diff_", granule, true}, snapshots, weights, before);
  }

  // Every op of the family, under the dispatch key of `library`.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("diff_", TORCH_BOX(&diff_));
    library.impl("foreach_diff_", TORCH_BOX(&foreach_diff_));
  }
};

}  // namespace shira
