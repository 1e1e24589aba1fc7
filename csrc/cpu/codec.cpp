// Indices to bytes and back, in parallel over blocks: core/codec.h is the format.
#include <atomic>
#include <limits>

#include "../core/codec.h"
#include "../ops/codec.h"

namespace shira::cpu {
namespace {

namespace codec = shira::core::codec;

// A block of 4096 takes about a microsecond, so it takes a few of them to make another thread worth its while.
constexpr int64_t kBlocksAThread = 16;

struct Cpu {
  template <typename Index>
  static Tensor encode(const Tensor& indices, int64_t version) {
    const Index* data = indices.const_data_ptr<Index>();
    const int64_t count = indices.numel();
    codec::Encoder<Index> encoder(data, count, version);
    const int64_t grain = kBlocksAThread / codec::Encoder<Index>::kChunk;
    std::atomic<bool> good{true};
    torch::stable::parallel_for(0, encoder.chunks(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk)
        if (!encoder.encode(chunk)) return good.store(false, std::memory_order_relaxed);
    });
    if (!good.load()) refuse(codec::explain_indices(data, count));
    Tensor code = torch::stable::new_empty(indices, {encoder.place()}, ScalarType::Byte);
    uint8_t* out = code.mutable_data_ptr<uint8_t>();
    torch::stable::parallel_for(0, encoder.chunks(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) encoder.write(chunk, out);
    });
    return code;
  }

  template <typename Index>
  static Tensor decode(const Tensor& bytes, int64_t count, int64_t granules, ScalarType dtype) {
    const codec::Code code{bytes.const_data_ptr<uint8_t>(), bytes.numel(), count, granules,
                           std::numeric_limits<Index>::max()};
    if (!codec::holds(code)) refuse(codec::explain_size(code));
    Tensor indices = torch::stable::new_empty(bytes, {count}, dtype);
    Index* out = indices.mutable_data_ptr<Index>();
    const core::Width width = core::widest();
    // The first block that is refused is named, whichever thread finds it: an exception raised in the pool would lose
    // its message.
    std::atomic<int64_t> refused{code.blocks()};
    torch::stable::parallel_for(0, code.blocks(), kBlocksAThread, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        if (codec::decode_block(code, block, out + block * codec::kBlock, width)) continue;
        int64_t first = refused.load();
        while (block < first && !refused.compare_exchange_weak(first, block)) {
        }
        return;
      }
    });
    if (refused.load() < code.blocks()) refuse(codec::explain_block(code, refused.load()));
    return indices;
  }
};

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (!shira::backend_is_reference()) shira::CodecOps<shira::cpu::Cpu>::implement(m);
}
