// Indices to bytes and back, in parallel over blocks: core/codec.h is the format.
#include <atomic>
#include <limits>

#include "../checks.h"
#include "../core/codec.h"

namespace shira::cpu {
namespace {

namespace codec = shira::core::codec;

// A block of 4096 takes about a microsecond: a thread is worth waking for a few of them.
constexpr int64_t kBlocksAThread = 16;

template <typename Index>
Tensor encode(const Tensor& indices) {
  const Index* data = indices.const_data_ptr<Index>();
  const int64_t count = indices.numel();
  codec::Encoder<Index> encoder(data, count);
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

Tensor encode_indices(const Tensor& indices, int64_t granule) {
  const char* op = "encode_indices";
  check_granule(op, granule);
  check_indices(op, {"indices"}, indices);
  return indices.scalar_type() == ScalarType::Int ? encode<int32_t>(indices) : encode<int64_t>(indices);
}

template <typename Index>
Tensor decode(const Tensor& bytes, int64_t count, int64_t granules, ScalarType dtype) {
  const codec::Code code{bytes.const_data_ptr<uint8_t>(), bytes.numel(), count, granules,
                         std::numeric_limits<Index>::max()};
  if (!codec::holds(code)) refuse(codec::explain_size(code));
  Tensor indices = torch::stable::new_empty(bytes, {count}, dtype);
  Index* out = indices.mutable_data_ptr<Index>();
  const core::Width width = core::widest();
  // The first block that is refused is named, whichever thread finds it: an exception raised in the pool would
  // lose its sentence.
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

Tensor decode_indices(const Tensor& code, int64_t count, int64_t limit, ScalarType dtype, int64_t granule) {
  const char* op = "decode_indices";
  check_granule(op, granule);
  SHIRA_CHECK(code.scalar_type() == ScalarType::Byte, op, ": code must be uint8, got ", dtype_name(code.scalar_type()));
  SHIRA_CHECK(code.dim() == 1, op, ": code must be 1-D, got shape ", list_text(code.sizes()));
  check_contiguous(op, {"code"}, code);
  SHIRA_CHECK(count >= 0, op, ": count must be at least 0, got ", count);
  SHIRA_CHECK(limit >= 0 && limit % granule == 0, op, ": limit must be a multiple of granule ", granule,
              " and not negative, got ", limit);
  SHIRA_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, ": dtype must be int32 or int64, got ",
              dtype_name(dtype));
  return dtype == ScalarType::Int ? decode<int32_t>(code, count, limit / granule, dtype)
                                  : decode<int64_t>(code, count, limit / granule, dtype);
}

}  // namespace
}  // namespace shira::cpu

STABLE_TORCH_LIBRARY_IMPL(shira, CPU, m) {
  if (shira::backend_is_reference()) return;
  m.impl("encode_indices", TORCH_BOX(&shira::cpu::encode_indices));
  m.impl("decode_indices", TORCH_BOX(&shira::cpu::decode_indices));
}
