// The ops of the fingerprint family, once for every compiled backend: checked first, then the backend sums.
//
// A backend has static functions, whose arguments are already checked:
//   content(op, name, indices, limit)   refuses indices that are not strictly increasing in [0, limit) granules,
//                                       where that needs no synchronisation
//   whole(weight), touched(weight, indices, granule), placed(weight, placing): the sums, int64 and 0-dim on the
//                                       weight's device
#pragma once
#include "../checks.h"
#include "../core/fingerprint.h"

namespace shira {

template <typename Backend>
struct FingerprintOps {
  static Tensor fingerprint(const Tensor& weight, int64_t granule) {
    const char* op = "fingerprint";
    check_granule(op, granule);
    check_weight(op, weight, 1, Kind::Moves);  // it reads the whole weight, whatever the granule
    check_granule_fits(op, granule, weight.numel(), "weight's ", weight.numel(), " entries");
    check_memory(op, {"weight"}, weight);
    return Backend::whole(weight);
  }

  static Tensor fingerprint_at(const Tensor& weight, const Tensor& indices, int64_t granule) {
    const char* op = "fingerprint_at";
    check_granule(op, granule);
    check_weight(op, weight, granule, Kind::Moves);
    check_device(op, {"indices"}, indices, weight, {"weight"});
    check_indices(op, {"indices"}, indices);
    check_memory(op, {"weight"}, weight);
    check_memory(op, {"indices"}, indices);
    Backend::content(op, {"indices"}, indices, weight.numel() / granule);
    return Backend::touched(weight, indices, granule);
  }

  static Tensor fingerprint_part(const Tensor& weight, int64_t first, int64_t run, int64_t stride, int64_t granule) {
    const char* op = "fingerprint_part";
    check_granule(op, granule);
    check_weight(op, weight, 1, Kind::Moves);
    check_granule_fits(op, granule, weight.numel(), "weight's ", weight.numel(), " entries");
    check_memory(op, {"weight"}, weight);
    SHIRA_CHECK(first >= 0, op, ": first must be at least 0, got ", first);
    SHIRA_CHECK(run >= 1, op, ": run must be at least 1, got ", run);
    SHIRA_CHECK(stride >= run, op, ": stride must be at least run ", run, ", got ", stride);
    return Backend::placed(weight, core::Placing{first, run, stride});
  }

  // Every op of the family, under the dispatch key of `library`.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("fingerprint", TORCH_BOX(&fingerprint));
    library.impl("fingerprint_at", TORCH_BOX(&fingerprint_at));
    library.impl("fingerprint_part", TORCH_BOX(&fingerprint_part));
  }
};

}  // namespace shira
