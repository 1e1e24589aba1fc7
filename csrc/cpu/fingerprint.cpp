// The fingerprint of a weight: whole, of the words that some granules touch and how much a swap changes it, or of a
// part of a larger one.
#include <atomic>

#include "../core/fingerprint.h"
#include "../ops/fingerprint.h"
#include "../ops/switch.h"
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

template <typename Index>
uint64_t swap_one(const Tensor& weight, const Tensor& indices, const Tensor& values, int64_t granule) {
  auto* data = static_cast<uint8_t*>(weight.data_ptr());
  auto* entries = static_cast<uint8_t*>(values.data_ptr());
  const Index* granules = indices.const_data_ptr<Index>();
  const int64_t bytes = byte_size(weight), granule_bytes = granule * static_cast<int64_t>(weight.element_size());
  const int64_t count = indices.numel(), words = granule_bytes / core::kWordBytes + 1;
  const core::Width width = core::widest();
  // Granules that share a word go to one thread: the one that has the first of them.
  const auto cut = [&](int64_t at) {
    while (at > 0 && at < count &&
           core::first_word(granules[at], granule_bytes) == core::last_word(granules[at - 1], granule_bytes))
      ++at;
    return at;
  };
  std::atomic<uint64_t> sum{0};
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / words), [&](int64_t begin, int64_t end) {
    sum += core::swap_touched(data, bytes, granules, cut(begin), cut(end), granule_bytes, entries, width);
  });
  return sum.load();
}

// foreach_swap_, and by how much it changes each weight's fingerprint: in one pass, since after the swap the words are
// still at hand. Receivers take it on the CPU.
Tensor foreach_swap_fingerprint(const Tensors& weights, const Tensors& indices, const Tensors& values,
                                int64_t granule) {
  Call call("foreach_swap_", granule, true);
  SwitchOps<Cpu>::check_move(call, weights, indices, values, true);
  SHIRA_CHECK(!weights.empty(), "_foreach_swap_fingerprint_: weights must not be empty");
  Tensor changes = torch::stable::new_empty(weights[0], {static_cast<int64_t>(weights.size())}, ScalarType::Long);
  for (size_t t = 0; t < weights.size(); ++t)
    changes.mutable_data_ptr<int64_t>()[t] = static_cast<int64_t>(
        indices[t].scalar_type() == ScalarType::Int ? swap_one<int32_t>(weights[t], indices[t], values[t], granule)
                                                    : swap_one<int64_t>(weights[t], indices[t], values[t], granule));
  return changes;
}

// The share of words that were read wherever a model has them: int64, as their positions in the weight.
Tensor fingerprint_words(const Tensor& words, const Tensor& positions) {
  const char* op = "_fingerprint_words";
  const auto flat = [](const Tensor& t) { return t.scalar_type() == ScalarType::Long && t.dim() == 1; };
  SHIRA_CHECK(flat(words) && flat(positions) && words.numel() == positions.numel(), op,
              ": words and positions must be int64, 1-D and as many");
  check_contiguous(op, {"words"}, words);
  check_contiguous(op, {"positions"}, positions);
  const auto *data = words.const_data_ptr<int64_t>(), *places = positions.const_data_ptr<int64_t>();
  return sum_over(words, words.numel(), kWordsAThread,
                  [&](int64_t begin, int64_t end) { return core::sum_read(data, places, begin, end); });
}

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (shira::backend_is_reference()) return;
  shira::FingerprintOps<shira::cpu::Cpu>::implement(m);
  m.impl("_foreach_swap_fingerprint_", TORCH_BOX(&shira::cpu::foreach_swap_fingerprint));
  m.impl("_fingerprint_words", TORCH_BOX(&shira::cpu::fingerprint_words));
}
