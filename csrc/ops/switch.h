// The ops of the switch family, once for every compiled backend: a single call is a list of one, everything is
// checked before the first write, and then the backend walks.
//
// A backend has static functions, all over lists of one length whose arguments are already checked:
//   content(op, name, indices, limit)   refuses indices that are not strictly increasing in [0, limit) granules,
//                                       where that needs no synchronisation
//   gather, scatter, swap (weights, indices, values, granule)
//   apply (weights, indices, values, saved, alpha, delta, granule)
//   exchange (weights, indices_out, saved_out, indices_in, values, saved_in, alpha, delta, granule): switch_
//   add (weight, indices, values, alpha, granule): scatter_add_
//   check (op, indices, limit): check_indices, which may synchronise
#pragma once
#include "../checks.h"

namespace shira {

template <typename Backend>
struct SwitchOps {
  static Tensors gather_list(Call call, const Tensors& weights, const Tensors& indices) {
    call.length("indices", indices, weights);
    call.weights(weights, Kind::Moves);
    for (size_t t = 0; t < weights.size(); ++t) call.indices("indices", indices[t], weights[t], t);
    for (size_t t = 0; t < weights.size(); ++t) check_memory(call.op, call.weight_name(t), weights[t]);
    for (size_t t = 0; t < weights.size(); ++t) check_memory(call.op, call.name("indices", t), indices[t]);
    content(call, "indices", indices, weights);
    Tensors values;
    values.reserve(weights.size());
    for (size_t t = 0; t < weights.size(); ++t)
      values.push_back(torch::stable::new_empty(weights[t], {indices[t].numel() * call.granule}));
    Backend::gather(weights, indices, values, call.granule);
    return values;
  }

  // `swaps`: values are written too.
  static void check_move(Call& call, const Tensors& weights, const Tensors& indices, const Tensors& values,
                         bool swaps) {
    call.length("indices", indices, weights);
    call.length("values", values, weights);
    call.weights(weights, Kind::Moves);
    for (size_t t = 0; t < weights.size(); ++t) {
      call.indices("indices", indices[t], weights[t], t);
      call.values("values", values[t], Values::Weight, weights[t], indices[t], t);
    }
    call.memory("weight", "weights", weights, true);
    call.memory("indices", indices, false);
    call.memory("values", values, swaps);
    call.overlap.check();
    content(call, "indices", indices, weights);
  }

  static void move_list(Call call, const Tensors& weights, const Tensors& indices, const Tensors& values, bool swaps) {
    check_move(call, weights, indices, values, swaps);
    (swaps ? Backend::swap : Backend::scatter)(weights, indices, values, call.granule);
  }

  static void apply_list(Call call, const Tensors& weights, const Tensors& indices, const Tensors& values,
                         const Tensors& saved, double alpha, bool delta) {
    call.length("indices", indices, weights);
    call.length("values", values, weights);
    call.length("saved", saved, weights);
    call.weights(weights, Kind::Moves);
    for (size_t t = 0; t < weights.size(); ++t) {
      call.indices("indices", indices[t], weights[t], t);
      call.values("values", values[t], Values::WeightOrFloat32, weights[t], indices[t], t);
      call.values("saved", saved[t], Values::Weight, weights[t], indices[t], t);
    }
    for (const Tensor& weight : weights) call.alpha(weight, alpha, delta);
    call.memory("weight", "weights", weights, true);
    call.memory("indices", indices, false);
    call.memory("values", values, false);
    call.memory("saved", saved, true);
    call.overlap.check();
    content(call, "indices", indices, weights);
    Backend::apply(weights, indices, values, saved, alpha, delta, call.granule);
  }

  static void switch_list(Call call, const Tensors& weights, const Tensors& indices_out, const Tensors& saved_out,
                          const Tensors& indices_in, const Tensors& values, const Tensors& saved_in, double alpha,
                          bool delta) {
    call.length("indices_out", indices_out, weights);
    call.length("saved_out", saved_out, weights);
    call.length("indices_in", indices_in, weights);
    call.length("values", values, weights);
    call.length("saved_in", saved_in, weights);
    call.weights(weights, Kind::Moves);
    for (size_t t = 0; t < weights.size(); ++t) {
      call.indices("indices_out", indices_out[t], weights[t], t);
      call.values("saved_out", saved_out[t], Values::Weight, weights[t], indices_out[t], t);
      call.indices("indices_in", indices_in[t], weights[t], t);
      call.values("values", values[t], Values::WeightOrFloat32, weights[t], indices_in[t], t);
      call.values("saved_in", saved_in[t], Values::Weight, weights[t], indices_in[t], t);
    }
    for (const Tensor& weight : weights) call.alpha(weight, alpha, delta);
    call.memory("weight", "weights", weights, true);
    call.memory("indices_out", indices_out, false);
    call.memory("saved_out", saved_out, false);
    call.memory("indices_in", indices_in, false);
    call.memory("values", values, false);
    call.memory("saved_in", saved_in, true);
    call.overlap.check();
    for (size_t t = 0; t < weights.size(); ++t) {
      content(call, "indices_out", indices_out[t], weights[t], t);
      content(call, "indices_in", indices_in[t], weights[t], t);
    }
    Backend::exchange(weights, indices_out, saved_out, indices_in, values, saved_in, alpha, delta, call.granule);
  }

  static void content(const Call& call, const char* word, const Tensor& indices, const Tensor& weight, int64_t t) {
    Backend::content(call.op, call.name(word, t), indices, weight.numel() / call.granule);
  }
  static void content(const Call& call, const char* word, const Tensors& indices, const Tensors& weights) {
    for (size_t t = 0; t < weights.size(); ++t) content(call, word, indices[t], weights[t], t);
  }

  // ---- as the schemas have them ----

  static Tensor gather(const Tensor& weight, const Tensor& indices, int64_t granule) {
    return gather_list({"gather", granule, false}, {weight}, {indices})[0];
  }
  static void scatter_(const Tensor& weight, const Tensor& indices, const Tensor& values, int64_t granule) {
    move_list({"scatter_", granule, false}, {weight}, {indices}, {values}, false);
  }
  static void swap_(const Tensor& weight, const Tensor& indices, const Tensor& values, int64_t granule) {
    move_list({"swap_", granule, false}, {weight}, {indices}, {values}, true);
  }
  static void apply_(const Tensor& weight, const Tensor& indices, const Tensor& values, const Tensor& saved,
                     double alpha, bool delta, int64_t granule) {
    apply_list({"apply_", granule, false}, {weight}, {indices}, {values}, {saved}, alpha, delta);
  }
  static void switch_(const Tensor& weight, const Tensor& indices_out, const Tensor& saved_out,
                      const Tensor& indices_in, const Tensor& values, const Tensor& saved_in, double alpha, bool delta,
                      int64_t granule) {
    switch_list({"switch_", granule, false}, {weight}, {indices_out}, {saved_out}, {indices_in}, {values}, {saved_in},
                alpha, delta);
  }
  static void scatter_add_(const Tensor& weight, const Tensor& indices, const Tensor& values, double alpha,
                           int64_t granule) {
    Call call("scatter_add_", granule, false);
    check_weight(call.op, weight, granule, Kind::Arithmetic);
    call.indices("indices", indices, weight, 0);
    call.values("values", values, Values::WeightOrFloat32, weight, indices, 0);
    call.overlap.add({"weight"}, weight, true);
    call.overlap.add({"indices"}, indices, false);
    call.overlap.add({"values"}, values, false);
    call.overlap.check();
    content(call, "indices", indices, weight, 0);
    Backend::add(weight, indices, values, alpha, granule);
  }

  static Tensors foreach_gather(const Tensors& weights, const Tensors& indices, int64_t granule) {
    return gather_list({"foreach_gather", granule, true}, weights, indices);
  }
  static void foreach_scatter_(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    move_list({"foreach_scatter_", granule, true}, weights, indices, values, false);
  }
  static void foreach_swap_(const Tensors& weights, const Tensors& indices, const Tensors& values, int64_t granule) {
    move_list({"foreach_swap_", granule, true}, weights, indices, values, true);
  }
  static void foreach_apply_(const Tensors& weights, const Tensors& indices, const Tensors& values,
                             const Tensors& saved, double alpha, bool delta, int64_t granule) {
    apply_list({"foreach_apply_", granule, true}, weights, indices, values, saved, alpha, delta);
  }
  static void foreach_switch_(const Tensors& weights, const Tensors& indices_out, const Tensors& saved_out,
                              const Tensors& indices_in, const Tensors& values, const Tensors& saved_in, double alpha,
                              bool delta, int64_t granule) {
    switch_list({"foreach_switch_", granule, true}, weights, indices_out, saved_out, indices_in, values, saved_in,
                alpha, delta);
  }

  static void check_indices(const Tensor& indices, int64_t limit, int64_t granule) {
    const char* op = "check_indices";
    check_granule(op, granule);
    shira::check_indices(op, {"indices"}, indices);
    check_limit(op, limit, granule);
    check_memory(op, {"indices"}, indices);
    Backend::check(op, indices, limit / granule);
  }

  // Every op of the family, under the dispatch key of `library`.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("gather", TORCH_BOX(&gather));
    library.impl("scatter_", TORCH_BOX(&scatter_));
    library.impl("swap_", TORCH_BOX(&swap_));
    library.impl("apply_", TORCH_BOX(&apply_));
    library.impl("switch_", TORCH_BOX(&switch_));
    library.impl("scatter_add_", TORCH_BOX(&scatter_add_));
    library.impl("foreach_gather", TORCH_BOX(&foreach_gather));
    library.impl("foreach_scatter_", TORCH_BOX(&foreach_scatter_));
    library.impl("foreach_swap_", TORCH_BOX(&foreach_swap_));
    library.impl("foreach_apply_", TORCH_BOX(&foreach_apply_));
    library.impl("foreach_switch_", TORCH_BOX(&foreach_switch_));
    library.impl("check_indices", TORCH_BOX(&check_indices));
  }
};

}  // namespace shira
