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
    check_given(op, owner, grad_output);
    SHIRA_CHECK(is_float(grad_output.scalar_type()), op,
                ": grad_output must be float16, bfloat16, float32 or float64, got ",
                dtype_name(grad_output.scalar_type()));
    SHIRA_CHECK(grad_output.dim() >= 1, op, ": grad_output must have at least one dimension, got shape ",
                list_text(grad_output.sizes()));
    check_contiguous(op, owner, grad_output);

    check_device(op, {"input"}, input, grad_output, owner);
    SHIRA_CHECK(input.scalar_type() == grad_output.scalar_type(), op, ": input must have grad_output's dtype ",
                dtype_name(grad_output.scalar_type()), ", got ", dtype_name(input.scalar_type()));
    const auto sizes = grad_output.sizes();
    const std::vector<int64_t> lead(sizes.begin(), sizes.end() - 1);
    SHIRA_CHECK(input.dim() == grad_output.dim() && std::equal(lead.begin(), lead.end(), input.sizes().begin()), op,
                ": input must have shape ", list_text(lead), " before its last dimension, got shape ",
                list_text(input.sizes()));
    check_contiguous(op, {"input"}, input);

    check_device(op, {"indices"}, indices, grad_output, owner);
    check_indices(op, {"indices"}, indices);
    SampledGrad problem{1, sizes[lead.size()], input.sizes()[lead.size()], granule};
    for (const int64_t size : lead) problem.tokens *= size;
    int64_t entries;  // without tokens the arguments are empty, however many there are
    SHIRA_CHECK(!__builtin_mul_overflow(problem.rows, problem.columns, &entries), op,
                ": weight must have fewer than 2^63 entries, got shape ",
                list_text(std::vector{problem.rows, problem.columns}));
    check_granule_fits(op, granule, entries, "weight's ", entries, " entries");
    SHIRA_CHECK(entries % granule == 0, op, ": granule must divide weight's ", entries, " entries, got ", granule);
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
