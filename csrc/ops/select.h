// The ops of the select family, once for every compiled backend: everything is checked, then the backend selects.
//
// A backend has static functions whose arguments are already checked:
//   top(weight, grad, k, score, granule) -> indices    grad is null for Score::Magnitude
//   random(permutation, indices)    the images of 0 .. k-1, ascending; k is at least 1
#pragma once
#include <array>
#include <optional>

#include "../checks.h"
#include "../core/select.h"

namespace shira {

inline ScalarType index_type(int64_t granules) {
  return granules < (int64_t{1} << 31) ? ScalarType::Int : ScalarType::Long;
}

inline void check_count(const char* op, int64_t k, int64_t granules) {
  SHIRA_CHECK(k >= 0 && k <= granules, op, ": k must be in [0, ", granules, "], got ", k);
}

inline void check_select_random(int64_t numel, int64_t k, int64_t granule) {
  const char* op = "select_random";
  check_granule(op, granule);
  SHIRA_CHECK(numel >= 0, op, ": numel must be at least 0, got ", numel);
  check_granule_fits(op, granule, numel, "numel ", numel);
  SHIRA_CHECK(numel % granule == 0, op, ": granule must divide numel ", numel, ", got ", granule);
  check_count(op, k, numel / granule);
}

// select_random has no tensor that shows its device. For a GPU, `op` ("<library>::_select_random") is called with an
// empty tensor that does.
inline Tensor select_random_on(const char* op, const torch::stable::Device& device, int64_t numel, int64_t k,
                               int64_t seed, int64_t granule) {
  using torch::stable::detail::from;
  const Tensor like = torch::stable::empty({0}, ScalarType::Byte, std::nullopt, device);
  std::array<StableIValue, 5> stack{from(like), from(numel), from(k), from(seed), from(granule)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

template <typename Backend>
struct SelectOps {
  static Tensor select_top(const Tensor& weight, const std::optional<Tensor>& grad, int64_t k, std::string score,
                           int64_t granule) {
    const char* op = "select_top";
    check_granule(op, granule);
    check_weight(op, weight, granule, Kind::Arithmetic);
    const bool reads = score != "magnitude";
    if (grad.has_value() && reads) {
      check_device(op, {"grad"}, *grad, weight, {"weight"});
      check_dtype(op, {"grad"}, *grad, Values::WeightOrFloat32, weight, {"weight"});
      SHIRA_CHECK(same_shape(*grad, weight), op, ": grad must have weight's shape ", list_text(weight.sizes()),
                  ", got shape ", list_text(grad->sizes()));
      check_contiguous(op, {"grad"}, *grad);
    }
    SHIRA_CHECK(!reads || score == "grad" || score == "snip", op, ": score must be magnitude, grad or snip, got \"",
                score, '"');
    check_count(op, k, weight.numel() / granule);
    SHIRA_CHECK(grad.has_value() || !reads, op, ": grad must be given for score ", score, ", got None");
    check_memory(op, {"weight"}, weight);
    if (reads) check_memory(op, {"grad"}, *grad);
    const core::Score how = !reads ? core::Score::Magnitude : score == "grad" ? core::Score::Grad : core::Score::Snip;
    return Backend::top(weight, reads ? &*grad : nullptr, k, how, granule);
  }

  // `like` is there for its device alone.
  static Tensor select_random(const Tensor& like, int64_t numel, int64_t k, int64_t seed, int64_t granule) {
    check_select_random(numel, k, granule);
    const int64_t domain = numel / granule;
    Tensor indices = room(like, k, index_type(domain));
    if (k > 0) Backend::random({static_cast<uint64_t>(domain), static_cast<uint64_t>(seed)}, indices);
    return indices;
  }

  static Tensor room(const Tensor& like, int64_t k, ScalarType type) {
    try {
      return torch::stable::new_empty(like, {k}, type);
    } catch (const std::exception& error) {
      refuse("select_random: there is no memory for k ", k, " indices (", error.what(), ")");
    }
  }

  // Every op of the family that a tensor argument dispatches, under the dispatch key of `library`.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("select_top", TORCH_BOX(&select_top));
    library.impl("_select_random", TORCH_BOX(&select_random));
  }
};

}  // namespace shira
