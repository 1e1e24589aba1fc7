// The ops of the codec family, once for every compiled backend: checked first, then the backend encodes or decodes.
//
// A backend has static functions, whose arguments are already checked. Both look at the content and may refuse it, so
// both may synchronise:
//   encode<Index>(indices, version) and decode<Index>(code, count, granules, dtype)
#pragma once
#include "../checks.h"

namespace shira {

template <typename Backend>
struct CodecOps {
  static Tensor encode_indices(const Tensor& indices, int64_t granule, int64_t version) {
    const char* op = "encode_indices";
    check_granule(op, granule);
    check_indices(op, {"indices"}, indices);
    SHIRA_CHECK(version == 1 || version == 2, op, ": version must be 1 or 2, got ", version);
    check_memory(op, {"indices"}, indices);
    return indices.scalar_type() == ScalarType::Int ? Backend::template encode<int32_t>(indices, version)
                                                    : Backend::template encode<int64_t>(indices, version);
  }

  static Tensor decode_indices(const Tensor& code, int64_t count, int64_t limit, ScalarType dtype, int64_t granule) {
    const char* op = "decode_indices";
    check_granule(op, granule);
    SHIRA_CHECK(code.scalar_type() == ScalarType::Byte, op, ": code must be uint8, got ",
                dtype_name(code.scalar_type()));
    SHIRA_CHECK(code.dim() == 1, op, ": code must be 1-D, got shape ", list_text(code.sizes()));
    check_contiguous(op, {"code"}, code);
    SHIRA_CHECK(count >= 0, op, ": count must be at least 0, got ", count);
    check_limit(op, limit, granule);
    SHIRA_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, ": dtype must be int32 or int64, got ",
                dtype_name(dtype));
    check_memory(op, {"code"}, code);
    return dtype == ScalarType::Int ? Backend::template decode<int32_t>(code, count, limit / granule, dtype)
                                    : Backend::template decode<int64_t>(code, count, limit / granule, dtype);
  }

  // Every op of the family, under the dispatch key of `library`.
  template <typename Library>
  static void implement(Library& library) {
    library.impl("encode_indices", TORCH_BOX(&encode_indices));
    library.impl("decode_indices", TORCH_BOX(&decode_indices));
  }
};

}  // namespace shira
