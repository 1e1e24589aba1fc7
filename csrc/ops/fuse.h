// The ops of the fuse family, once for every compiled backend: everything is checked before the first write.
//
// A backend has static functions, whose arguments are already checked:
//   content(op, name, indices, limit)   refuses indices that are not strictly increasing in [0, limit) granules,
//                                       where that needs no synchronisation
//   plan_content(granules, plan, values, granule)   refuses a plan that does not fit them, likewise
//   plan(indices): fuse_plan, which checks the content too; it may synchronise
//   fuse(weight, saved, indices, plan, values, alphas, delta, refuse, granule)
#pragma once
#include <tuple>

#include "../checks.h"
#include "../core/fuse.h"

namespace shira {

// What `fuse_plan` says beside the union's indices.
struct FusePlan {
  const Tensor &offsets, &sources, &members;
};

template <typename Backend>
struct FuseOps {
  static void check_adapters(const char* op, const char* name, const Tensors& tensors) {
    const auto count = static_cast<int64_t>(tensors.size());
    SHIRA_CHECK(count >= 1 && count <= core::kMostAdapters, op, ": ", name, " must have 1 to ", core::kMostAdapters,
                " tensors, got ", count);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> fuse_plan(const Tensors& indices, int64_t granule) {
    const char* op = "fuse_plan";
    check_granule(op, granule);
    check_adapters(op, "indices", indices);
    for (size_t k = 0; k < indices.size(); ++k) {
      const Name name{"indices", static_cast<int64_t>(k)};
      SHIRA_CHECK(indices[k].device() == indices[0].device(), op, ": ", name, " must be on the device of indices[0] ",
                  device_name(indices[0]), ", got ", device_name(indices[k]));
      check_indices(op, name, indices[k]);
    }
    for (size_t k = 0; k < indices.size(); ++k) check_memory(op, {"indices", static_cast<int64_t>(k)}, indices[k]);
    return Backend::plan(indices);
  }

  static void fuse_(const Tensor& weight, const Tensor& saved, const Tensor& indices, const Tensor& offsets,
                    const Tensor& sources, const Tensor& members, const Tensors& values, const Tensor& alphas,
                    const std::vector<bool>& delta, bool refuse, int64_t granule) {
    const char* op = "fuse_";
    Call call(op, granule, false);
    check_adapters(op, "values", values);
    SHIRA_CHECK(delta.size() == values.size(), op, ": delta must have one bool for each of the ", values.size(),
                " values, got ", delta.size());
    check_weight(op, weight, granule, Kind::Arithmetic);
    check_given(op, {"indices"}, indices);
    call.values("saved", saved, Values::Weight, weight, indices, 0);
    call.indices("indices", indices, weight, 0);
    call.indices("offsets", offsets, weight, 0);
    const int64_t groups = core::groups_of(indices.numel());
    SHIRA_CHECK(offsets.numel() == groups + 1, op, ": offsets must have ", groups + 1,
                " entries (one for each 64 of the ", indices.numel(), " indices, and one more), got ", offsets.numel());
    for (const auto& [name, tensor] : {std::pair{"sources", &sources}, std::pair{"members", &members}}) {
      check_device(op, {name}, *tensor, weight, {"weight"});
      check_exact_dtype(op, {name}, *tensor, ScalarType::Long);
      check_one_dimensional(op, {name}, *tensor);
      check_contiguous(op, {name}, *tensor);
    }
    SHIRA_CHECK(members.numel() == sources.numel(), op, ": members must have one entry for each of the ",
                sources.numel(), " sources, got ", members.numel());
    for (size_t k = 0; k < values.size(); ++k) {
      const Name name{"values", static_cast<int64_t>(k)};
      const Tensor& own = values[k];
      check_device(op, name, own, weight, {"weight"});
      check_dtype(op, name, own, Values::WeightOrFloat32, weight, {"weight"});
      SHIRA_CHECK(own.scalar_type() == values[0].scalar_type(), op, ": ", name, " must have the dtype of values[0] ",
                  dtype_name(values[0].scalar_type()), ", got ", dtype_name(own.scalar_type()));
      check_one_dimensional(op, name, own);
      SHIRA_CHECK(own.numel() % granule == 0, op, ": ", name, " must have a multiple of granule ", granule,
                  " entries, got ", own.numel());
      check_contiguous(op, name, own);
    }
    check_device(op, {"alphas"}, alphas, weight, {"weight"});
    check_exact_dtype(op, {"alphas"}, alphas, compute_type(weight.scalar_type()));
    check_one_dimensional(op, {"alphas"}, alphas);
    SHIRA_CHECK(alphas.numel() == static_cast<int64_t>(values.size()), op,
                ": alphas must have one entry for each of the ", values.size(), " values, got ", alphas.numel());
    check_contiguous(op, {"alphas"}, alphas);

    call.overlap.add({"weight"}, weight, true);
    call.overlap.add({"saved"}, saved, true);
    call.overlap.add({"indices"}, indices, false);
    call.overlap.add({"offsets"}, offsets, false);
    call.overlap.add({"sources"}, sources, false);
    call.overlap.add({"members"}, members, false);
    for (size_t k = 0; k < values.size(); ++k) call.overlap.add({"values", static_cast<int64_t>(k)}, values[k], false);
    call.overlap.add({"alphas"}, alphas, false);
    call.overlap.check();
    Backend::content(op, {"indices"}, indices, weight.numel() / granule);
    const FusePlan plan{offsets, sources, members};
    Backend::plan_content(indices.numel(), plan, values, granule);
    Backend::fuse(weight, saved, indices, plan, values, alphas, delta, refuse, granule);
  }

  // Every op of the family, under the dispatch key of `library`.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("fuse_plan", TORCH_BOX(&fuse_plan));
    library.impl("fuse_", TORCH_BOX(&fuse_));
  }
};

// ---- the sentences of a plan's content, for backends that read it ------------------------------------------

// Names the first of `offsets` that does not fit into a rise from 0 to `total`.
template <typename O>
[[noreturn]] inline void refuse_offsets(const O* offsets, int64_t n, int64_t total) {
  for (int64_t i = 0; i < n; ++i) {
    const bool bad = (i == 0 ? offsets[i] != 0 : offsets[i] < offsets[i - 1] || offsets[i] > total) ||
                     (i == n - 1 && offsets[i] != total);
    if (bad) refuse("fuse_: offsets must rise from 0 to the ", total, " sources, got ", offsets[i], " at position ", i);
  }
  refuse("fuse_: offsets changed while they were checked");
}

// Whether a source names one of the adapters and only granules of it: `sizes[adapter]` of them, or `size` for each.
inline bool source_fits(int64_t source, int64_t members, const int64_t* sizes, int64_t adapters) {
  const int64_t adapter = core::adapter_of(source), count = core::count_of(static_cast<uint64_t>(members));
  return adapter >= 0 && adapter < adapters && core::position_of(source) + count <= sizes[adapter];
}
inline bool source_fits(int64_t source, int64_t members, int64_t size, int64_t adapters) {
  const int64_t adapter = core::adapter_of(source), count = core::count_of(static_cast<uint64_t>(members));
  return (adapter >= 0) & (adapter < adapters) & (core::position_of(source) + count <= size);  // no branch: vectorises
}

// Names the first of `sources` that does not name an adapter and only some of its `sizes[adapter]` granules.
[[noreturn]] inline void refuse_sources(const int64_t* sources, const int64_t* members, int64_t n, const int64_t* sizes,
                                        int64_t adapters) {
  for (int64_t i = 0; i < n; ++i)
    if (!source_fits(sources[i], members[i], sizes, adapters))
      refuse("fuse_: sources must name one of the ", adapters, " values and granules of it, got adapter ",
             core::adapter_of(sources[i]), ", granule ", core::position_of(sources[i]), " with ",
             core::count_of(static_cast<uint64_t>(members[i])), " members at position ", i);
  refuse("fuse_: sources changed while they were checked");
}

// Refuses members of the last group, which are those from `begin` to `end`, that come after the union's last granule.
inline void check_last_members(const int64_t* members, int64_t begin, int64_t end, int64_t granules) {
  const int64_t room = granules % core::kGroup;
  if (room == 0) return;
  for (int64_t i = begin; i < end; ++i) {
    const uint64_t after = static_cast<uint64_t>(members[i]) >> room;
    if (after != 0)
      refuse("fuse_: members must name entries of the ", granules, " indices, got entry ",
             granules + core::count_of((after & (~after + 1)) - 1), " at position ", i);
  }
}

}  // namespace shira
