// The fingerprint of a weight: whole, of the words that some granules touch, or of a part of a larger one.
#include <atomic>

#include "../core/fingerprint.h"
#include "../ops/fingerprint.h"
#include "indices.h"

namespace shira::cpu {
namespace {

constexpr int64_t kWordsAThread = 1 << 14;  // 128 KiB: some 5 microseconds of reading

int64_t byte_size(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

// A sum mod 2^64 has the same bits in any order, so threads may add as they finish.
template <typename F>
Tensor sum_over(const Tensor& weight, int64_t n, int64_t grain, const F& share) {
  std::atomic<uint64_t> sum{0};
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { sum += share(begin, end); });
  Tensor result = torch::stable::new_empty(weight, {}, ScalarType::Long);
  *result.mutable_data_ptr<int64_t>() = static_cast<int64_t>(sum.load());
  return result;
}

template <typename Index>
Tensor sum_at(const Tensor& weight, const Tensor& indices, int64_t granule) {
  const auto* data = static_cast<const uint8_t*>(weight.const_data_ptr());
  const Index* granules = indices.const_data_ptr<Index>();
  const int64_t bytes = byte_size(weight), granule_bytes = granule * static_cast<int64_t>(weight.element_size());
  const int64_t words = granule_bytes / core::kWordBytes + 1;
  const core::Width width = core::widest();
  return sum_over(weight, indices.numel(), std::max<int64_t>(1, kGrain / words), [&](int64_t begin, int64_t end) {
    return core::sum_touched(data, bytes, granules, begin, end, granule_bytes, width);
  });
}

struct Cpu {
  static void content(const char* op, Name name, const Tensor& indices, int64_t limit) {
    check_indices_content(op, name, indices, limit);
  }
  static Tensor whole(const Tensor& weight) {
    const auto* data = static_cast<const uint8_t*>(weight.const_data_ptr());
    const int64_t bytes = byte_size(weight);
    const core::Width width = core::widest();
    return sum_over(weight, core::word_count(bytes), kWordsAThread,
                    [&](int64_t begin, int64_t end) { return core::sum_words(data, bytes, begin, end, width); });
  }
  static Tensor placed(const Tensor& weight, const core::Placing& placing) {
    const auto* data = static_cast<const uint8_t*>(weight.const_data_ptr());
    const core::Width width = core::widest();
    const int64_t bytes = byte_size(weight);
    return sum_over(weight, core::word_count(bytes), kWordsAThread, [&](int64_t begin, int64_t end) {
      return core::sum_placed(data, bytes, begin, end, placing, width);
    });
  }
  static Tensor touched(const Tensor& weight, const Tensor& indices, int64_t granule) {
    return indices.scalar_type() == ScalarType::Int ? sum_at<int32_t>(weight, indices, granule)
                                                    : sum_at<int64_t>(weight, indices, granule);
  }
};

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (!shira::backend_is_reference()) shira::FingerprintOps<shira::cpu::Cpu>::implement(m);
}
