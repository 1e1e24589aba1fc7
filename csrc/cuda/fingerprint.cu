// The fingerprint on CUDA: of a whole weight, of the words that some granules touch, or of a part of a larger weight.
//
// A whole weight is read at the speed of memory: 16 bytes per load, kItems loads in flight per thread. Mixing a word
// takes some thirty instructions, about half of what a GPU can issue while the next one arrives. A block adds up its
// tile and adds the total with one atomic: sums mod 2^64 have the same bits in any order.
#include "../core/fingerprint.h"
#include "../ops/fingerprint.h"
#include "block.h"

namespace shira::cuda {
namespace {

constexpr int kItems = 4;
constexpr int kTile = kThreads * kItems;

// The word at `position`, read kUnit bytes at a time, or byte by byte if the memory ends within it.
template <int kUnit>
__device__ __forceinline__ uint64_t word_at(const uint8_t* data, int64_t bytes, int64_t position) {
  const int64_t at = position * core::kWordBytes;
  uint64_t word = 0;
  if (bytes - at >= core::kWordBytes) {
#pragma unroll
    for (int k = 0; k < core::kWordBytes / kUnit; ++k)
      word |= static_cast<uint64_t>(load_weight(reinterpret_cast<const Unit<kUnit>*>(data + at) + k)) << 8 * kUnit * k;
  } else {
    for (int64_t k = at; k < bytes; ++k) word |= static_cast<uint64_t>(load_weight(data + k)) << 8 * (k - at);
  }
  return word;
}

struct Scalars {
  unsigned long long* sum;
};

__device__ __forceinline__ void add_tile(const Scalars& scalars, uint64_t sum) {
  sum = block_sum(sum);
  if (threadIdx.x == 0) atomicAdd(scalars.sum, static_cast<unsigned long long>(sum));
}

struct Bytes {
  const uint8_t* data;
  int64_t bytes;
};

// Pairs of words if the memory is aligned to 16 bytes, else one word at a time.
template <int kUnit>
struct Whole {
  using Row = Bytes;
  using Scalars = cuda::Scalars;
  static constexpr int kWords = kUnit == 16 ? 2 : 1;

  static int64_t tiles(const Row& row) { return (core::word_count(row.bytes) + kTile * kWords - 1) / (kTile * kWords); }
  static __device__ void tile(const Scalars& scalars, const Row& row, int64_t tile) {
    const int64_t words = core::word_count(row.bytes);
    uint64_t sum = 0;
    if constexpr (kUnit == 16) {
      using Two = Pack<uint64_t, 2>;
      const int64_t pairs = row.bytes / 16;
      Two pair[kItems];
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int64_t at = tile * kTile + k * kThreads + threadIdx.x;
        if (at < pairs) pair[k] = Two::stream(row.data, at);
      }
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int64_t at = tile * kTile + k * kThreads + threadIdx.x;
        if (at < pairs) {
          sum += core::mix_word(pair[k].entry[0], static_cast<uint64_t>(2 * at));
          sum += core::mix_word(pair[k].entry[1], static_cast<uint64_t>(2 * at + 1));
        } else if (at == pairs) {
          for (int64_t word = 2 * at; word < words; ++word)
            sum += core::mix_word(word_at<8>(row.data, row.bytes, word), static_cast<uint64_t>(word));
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const int64_t at = tile * kTile + k * kThreads + threadIdx.x;
        if (at < words) sum += core::mix_word(word_at<kUnit>(row.data, row.bytes, at), static_cast<uint64_t>(at));
      }
    }
    add_tile(scalars, sum);
  }
};

struct PlacedRow {
  const uint8_t* data;
  int64_t bytes;
  Granule run;
  core::Placing placing;
};

// A part of a larger tensor: one word at a time, since its position there takes a division anyway.
template <int kUnit>
struct Placed {
  using Row = PlacedRow;
  using Scalars = cuda::Scalars;
  // With as many as a whole weight's, the positions of 64 bits fill the registers of sm_80.
  static constexpr int kWords = kItems / 2;
  static constexpr int64_t kSpan = kWords * kThreads;

  static int64_t tiles(const Row& row) { return (core::word_count(row.bytes) + kSpan - 1) / kSpan; }
  static __device__ void tile(const Scalars& scalars, const Row& row, int64_t tile) {
    const int64_t words = core::word_count(row.bytes);
    int64_t at[kWords], number[kWords], within[kWords];
    uint64_t word[kWords], sum = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      at[k] = tile * kSpan + k * kThreads + threadIdx.x;
      if (at[k] < words) word[k] = word_at<kUnit>(row.data, row.bytes, at[k]);
    }
    row.run.split(at, tile * kSpan + kSpan, number, within);
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      if (at[k] < words) sum += core::mix_word(word[k], row.placing.at(number[k], within[k]));
    add_tile(scalars, sum);
  }
};

struct TouchedRow {
  const uint8_t* data;
  int64_t bytes;
  Indices indices;
  int64_t limit, granule_bytes;
  Granule words;  // the most words that a granule can touch
};

// Each item is a granule and one of the words it may touch; a word that the previous one touches too is left to it.
template <int kUnit>
struct Touched {
  using Row = TouchedRow;
  using Scalars = cuda::Scalars;

  static int64_t tiles(const Row& row) { return (row.indices.count * row.words.units + kTile - 1) / kTile; }

  static __device__ __forceinline__ int64_t last_word(const Row& row, int64_t index) {
    return ((index + 1) * row.granule_bytes - 1) / core::kWordBytes;
  }
  static __device__ void tile(const Scalars& scalars, const Row& row, int64_t tile) {
    uint64_t sum = 0;
    const int64_t total = row.indices.count * row.words.units, begin = tile * kTile, end = begin + kTile;
    const Items<kItems> items(row.indices, row.words, begin, end < total ? end : total);
    int64_t earlier[kItems], previous[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) earlier[k] = items.number[k] > 0 ? items.number[k] - 1 : 0;
    row.indices.all(earlier, previous);
    // The word of each item, or -1 for none. All words are in flight before the first is mixed.
    int64_t at[kItems];
    uint64_t word[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const bool inside = items.is(k) && within(items.index[k], row.limit);
      const int64_t index = inside ? items.index[k] : 0;
      const int64_t position = index * row.granule_bytes / core::kWordBytes + items.offset[k];
      const bool own = inside && position <= last_word(row, index);
      const bool twice =
          items.number[k] > 0 && within(previous[k], row.limit) && position <= last_word(row, previous[k]);
      at[k] = own && !twice ? position : -1;
    }
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      if (at[k] >= 0) word[k] = word_at<kUnit>(row.data, row.bytes, at[k]);
#pragma unroll
    for (int k = 0; k < kItems; ++k)
      if (at[k] >= 0) sum += core::mix_word(word[k], static_cast<uint64_t>(at[k]));
    add_tile(scalars, sum);
  }
};

struct Cuda {
  static void content(const char*, Name, const Tensor&, int64_t) {}  // each access is guarded instead

  static Tensor whole(const Tensor& weight) {
    const Device device(weight);
    const Bytes row{address<const uint8_t>(weight), byte_size(weight)};
    return sum(weight, device, [&](const Scalars& scalars) {
      with_unit(widest_unit(16, row.data), [&](auto unit) { launch_one<Whole<unit>>(scalars, row, device.stream); });
    });
  }

  static Tensor placed(const Tensor& weight, const core::Placing& placing) {
    const Device device(weight);
    const PlacedRow row{address<const uint8_t>(weight), byte_size(weight), Granule::of(placing.run), placing};
    return sum(weight, device, [&](const Scalars& scalars) {
      with_unit(widest_unit(8, row.data), [&](auto unit) {
        if constexpr (unit < 16) launch_one<Placed<unit>>(scalars, row, device.stream);
      });
    });
  }

  static Tensor touched(const Tensor& weight, const Tensor& indices, int64_t granule) {
    const Device device(weight);
    const int64_t bytes = granule * static_cast<int64_t>(weight.element_size());
    // A granule that does not start at a word's first byte may touch one more word.
    const int64_t words = bytes % 8 == 0 ? bytes / 8 : 8 % bytes == 0 ? 1 : (bytes + 6) / 8 + 1;
    const TouchedRow row{address<const uint8_t>(weight),
                         byte_size(weight),
                         indices_of(indices),
                         weight.numel() / granule,
                         bytes,
                         Granule::of(words)};
    return sum(weight, device, [&](const Scalars& scalars) {
      with_unit(widest_unit(8, row.data), [&](auto unit) {
        if constexpr (unit < 16) launch_one<Touched<unit>>(scalars, row, device.stream);
      });
    });
  }

  template <typename Start>
  static Tensor sum(const Tensor& weight, const Device& device, const Start& start) {
    Tensor result = torch::stable::new_empty(weight, {}, ScalarType::Long);
    const Scalars scalars{address<unsigned long long>(result)};
    SHIRA_CUDA_CHECK(cudaMemsetAsync(scalars.sum, 0, sizeof(*scalars.sum), device.stream));
    start(scalars);
    return result;
  }
};

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::FingerprintOps<shira::cuda::Cuda>::implement(m);
}
