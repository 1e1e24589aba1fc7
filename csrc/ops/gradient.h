// The ops of the gradient family, once for every compiled backend: everything is checked, the result is made, and
// the backend computes.
//
// A backend has static functions:
//   content(op, name, indices, limit)   refuses indices that are not strictly increasing in [0, limit) granules,
//                                       where that needs no synchronisation
//   sampled (problem, grad_output, input, indices, result): every entry of `result` is written
#pragma once
#include "../checks.h"

namespace shira {

// The sizes of one call: result[e] = sum over tokens of grad_output[token, row] * input[token, column].
struct SampledGrad {
  int64_t tokens, rows, columns, granule;
};

template <typename Backend>
struct GradientOps {
  static Tensor sampled_grad(const Tensor& grad_output, const Tensor& input, const Tensor& indices, int64_t granule) {
    const char* op = "sampled_grad";
    const Name owner{"grad_output"};
    check_granule(op, granule);
    check_activations(op, owner, grad_output);

    check_device(op, {"input"}, input, grad_output, owner);
    SHIRA_CHECK(input.scalar_type() == grad_output.scalar_type(), op, ": input must have grad_output's dtype ",
                dtype_name(grad_output.scalar_type()), ", got ", dtype_name(input.scalar_type()));
    const int64_t tokens = check_leads(op, {"input"}, input, grad_output);
    check_contiguous(op, {"input"}, input);

    check_device(op, {"indices"}, indices, grad_output, owner);
    check_indices(op, {"indices"}, indices);
    const SampledGrad problem{tokens, last_size(grad_output), last_size(input), granule};
    const int64_t entries = check_matrix(op, problem.rows, problem.columns, granule);
    check_memory(op, owner, grad_output);
    check_memory(op, {"input"}, input);
    check_memory(op, {"indices"}, indices);
    Backend::content(op, {"indices"}, indices, entries / granule);

    Tensor result = torch::stable::new_empty(input, {indices.numel() * granule}, compute_type(input.scalar_type()));
    if (result.numel() > 0) Backend::sampled(problem, grad_output, input, indices, result);
    return result;
  }

  // Every op of the family, under the dispatch key of `library`.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("sampled_grad", TORCH_BOX(&sampled_grad));
  }
};

}  // namespace shira
