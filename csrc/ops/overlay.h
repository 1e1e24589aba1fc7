// The ops of the overlay family, once for every compiled backend: everything is checked before the first write, and
// the backend computes.
//
// A backend has static functions, whose arguments are already checked:
//   multiply(problem, input, indices, values, result): every entry of `result`, which may have none, is written
//   add(problem, output, input, indices, values, adapters, alphas)
// Where that needs no synchronisation, they refuse adapters that there are not, and indices, of those that are named,
// that are not strictly increasing in [0, problem.limit()) granules.
#pragma once
#include "../checks.h"
#include "../core/fuse.h"

namespace shira {

// The sizes of one call: tokens of `features` go in, of `out_features` come out. The sparse matrix is
// [out_features, features], or transposed [features, out_features] and used as it lies.
struct SparseLinear {
  const char* op;
  int64_t tokens, features, out_features, granule;
  bool transposed;

  int64_t rows() const { return transposed ? features : out_features; }
  int64_t columns() const { return transposed ? out_features : features; }
  int64_t limit() const { return rows() * columns() / granule; }
};

template <typename Backend>
struct OverlayOps {
  static void check_sparse(const char* op, int64_t member, const Tensor& indices, const Tensor& values,
                           const Tensor& lead, Name owner, int64_t granule) {
    check_device(op, {"indices", member}, indices, lead, owner);
    check_indices(op, {"indices", member}, indices);
    check_values(op, {"values", member}, values, Values::WeightOrFloat32, lead, owner, indices, granule);
  }

  static Tensor sparse_linear(const Tensor& input, const Tensor& indices, const Tensor& values, int64_t out_features,
                              bool transposed, int64_t granule) {
    const char* op = "sparse_linear";
    const Name owner{"input"};
    check_granule(op, granule);
    check_activations(op, owner, input);
    SHIRA_CHECK(out_features >= 0, op, ": out_features must be at least 0, got ", out_features);
    std::vector<int64_t> sizes(input.sizes().begin(), input.sizes().end());
    SparseLinear problem{op, 1, sizes.back(), out_features, granule, transposed};
    sizes.back() = out_features;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) problem.tokens *= sizes[i];
    check_matrix(op, problem.rows(), problem.columns(), granule);
    check_sparse(op, -1, indices, values, input, owner, granule);
    check_memory(op, owner, input);
    check_memory(op, {"indices"}, indices);
    check_memory(op, {"values"}, values);
    Tensor result = torch::stable::new_empty(input, sizes);
    Backend::multiply(problem, input, indices, values, result);
    return result;
  }

  static void sparse_linear_add_(const Tensor& output, const Tensor& input, const Tensors& indices,
                                 const Tensors& values, const Tensor& adapters, const Tensor& alphas, int64_t granule,
                                 bool transposed) {
    const char* op = "sparse_linear_add_";
    const Name owner{"output"};
    const auto count = static_cast<int64_t>(indices.size());
    check_granule(op, granule);
    SHIRA_CHECK(count >= 1 && count <= core::kMostAdapters, op, ": indices must have 1 to ", core::kMostAdapters,
                " tensors, got ", count);
    SHIRA_CHECK(values.size() == indices.size(), op, ": values must have one tensor for each of the ", count,
                " indices, got ", values.size());
    check_activations(op, owner, output);
    check_device(op, {"input"}, input, output, owner);
    check_dtype(op, {"input"}, input, Values::Weight, output, owner);
    const int64_t tokens = check_leads(op, {"input"}, input, output);
    check_contiguous(op, {"input"}, input);
    const SparseLinear problem{op, tokens, last_size(input), last_size(output), granule, transposed};
    check_matrix(op, problem.rows(), problem.columns(), granule);
    for (int64_t k = 0; k < count; ++k) {
      check_sparse(op, k, indices[k], values[k], output, owner, granule);
      SHIRA_CHECK(values[k].scalar_type() == values[0].scalar_type(), op, ": values[", k,
                  "] must have the dtype of values[0] ", dtype_name(values[0].scalar_type()), ", got ",
                  dtype_name(values[k].scalar_type()));
    }
    check_table(op, {"adapters"}, adapters, output, owner, ScalarType::Int, tokens, "tokens");
    check_table(op, {"alphas"}, alphas, output, owner, compute_type(output.scalar_type()), count, "indices");

    Overlap overlap(op);
    overlap.add(owner, output, true);
    overlap.add({"input"}, input, false);
    for (int64_t k = 0; k < count; ++k) overlap.add({"indices", k}, indices[k], false);
    for (int64_t k = 0; k < count; ++k) overlap.add({"values", k}, values[k], false);
    overlap.add({"adapters"}, adapters, false);
    overlap.add({"alphas"}, alphas, false);
    overlap.check();
    if (tokens > 0) Backend::add(problem, output, input, indices, values, adapters, alphas);
  }

  // A table with one entry for each of `count` others.
  static void check_table(const char* op, Name name, const Tensor& t, const Tensor& output, Name owner,
                          ScalarType dtype, int64_t count, const char* others) {
    check_device(op, name, t, output, owner);
    check_exact_dtype(op, name, t, dtype);
    check_one_dimensional(op, name, t);
    SHIRA_CHECK(t.numel() == count, op, ": ", name, " must have one entry for each of the ", count, " ", others,
                ", got ", t.numel());
    check_contiguous(op, name, t);
  }

  // Every op of the family, under the dispatch key of `library`.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("sparse_linear", TORCH_BOX(&sparse_linear));
    library.impl("sparse_linear_add_", TORCH_BOX(&sparse_linear_add_));
  }
};

// The first token that names no adapter, for backends that read it.
inline void check_adapter_numbers(const char* op, const int32_t* adapters, int64_t tokens, int64_t count) {
  for (int64_t t = 0; t < tokens; ++t)
    SHIRA_CHECK(adapters[t] >= -1 && adapters[t] < count, op, ": adapters must be -1 or the number of one of the ",
                count, " indices, got ", adapters[t], " at position ", t);
}

}  // namespace shira
