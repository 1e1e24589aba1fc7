// The content of `indices`: checked once per call, before the first write.
#pragma once
#include <atomic>

#include "../checks.h"
#include "vector.h"

namespace shira::cpu {

constexpr int64_t kGrain = 4096;  // work units below which a second thread costs more than it saves

// If indices increase strictly and both ends are in range, all are: so the pass is one comparison for each pair.
template <typename I>
inline bool increasing(const I* p, int64_t begin, int64_t end) {
  return !vector_any<I>(end - begin, [p = p + begin](int64_t i) { return p[i] >= p[i + 1]; });
}

template <typename I>
inline void check_content(const char* op, Name name, const I* p, int64_t n, int64_t limit) {
  if (n == 0) return;
  bool good = p[0] >= 0 && (limit == kNoLimit || p[n - 1] < limit);
  if (n - 1 <= 4 * kGrain) {
    good = good && increasing(p, 0, n - 1);
  } else {
    std::atomic<bool> all{good};
    torch::stable::parallel_for(0, n - 1, 4 * kGrain, [&](int64_t begin, int64_t end) {
      if (!increasing(p, begin, end)) all.store(false, std::memory_order_relaxed);
    });
    good = all.load();
  }
  if (!good) refuse_content(op, name, p, n, limit);
}

// `limit` counts granules; it is kNoLimit where there is no weight.
inline void check_indices_content(const char* op, Name name, const Tensor& indices, int64_t limit) {
  if (indices.scalar_type() == ScalarType::Int)
    check_content(op, name, indices.const_data_ptr<int32_t>(), indices.numel(), limit);
  else
    check_content(op, name, indices.const_data_ptr<int64_t>(), indices.numel(), limit);
}

}  // namespace shira::cpu
