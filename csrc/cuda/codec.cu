// Indices to bytes and back on CUDA, in the format of core/codec.h. A thread block handles one block of the code.
//
// Both directions check content, and the size of a code is known only once it is made, so both synchronise: a code is
// made when an adapter is saved and read when it is loaded. A thread block decodes by sums over its units: how far each
// one advances the index, and how many gaps have ended before it. Units and decoded indices go through shared memory:
// each thread handles neighbouring ones, yet memory is accessed in whole lines.
#include "../core/codec.h"

#include "../ops/codec.h"
#include "block.h"

namespace shira::cuda {
namespace {

namespace codec = shira::core::codec;

constexpr uint64_t kMost = ~uint64_t{0};

// Sums that saturate at the largest number: an index that reaches it is refused.
struct Saturating {
  __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b < a ? kMost : a + b; }
};
// Codes may have any alignment. Neighbouring threads read neighbouring units, so single bytes come from L1.
template <typename T>
__device__ __forceinline__ T read(const uint8_t* at) {
  uint64_t value = 0;
#pragma unroll
  for (size_t k = 0; k < sizeof(T); ++k) value |= static_cast<uint64_t>(load_cached(at + k)) << 8 * k;
  return static_cast<T>(value);
}
template <typename T>
__device__ __forceinline__ void write(uint8_t* at, T value) {
#pragma unroll
  for (size_t k = 0; k < sizeof(T); ++k) store_stream(at + k, static_cast<uint8_t>(value >> 8 * k));
}

// ---- decode ------------------------------------------------------------------------------------------------

struct DecodeRow {
  const uint8_t* code;
  int64_t bytes, count;
  uint64_t bound;               // every index must be below it
  unsigned long long* refused;  // the first block that is refused
};

template <typename Index>
struct Decode {
  using Row = DecodeRow;
  struct Scalars {
    Index* out;
  };
  static int64_t tiles(const Row& row) { return codec::block_count(row.count); }

  // Units per thread in one step: at 1 %, the payload of a block (4440 bytes, of 5120) is one step. They are five words
  // of shared memory, so the lanes of a warp read from different banks.
  template <typename Unit>
  static constexpr int kItems = sizeof(Unit) == 1   ? 20
                                : sizeof(Unit) == 2 ? 10
                                                    : 2;
  static constexpr int kStaged = kThreads * 20;

  // Decodes the units of the payload [at, end) into out[1 .. n). Returns whether they are n - 1 gaps, the last of which
  // ends with the payload; `index` becomes the last index.
  template <typename Unit>
  static __device__ bool payload(const uint8_t* at, const uint8_t* end, int n, uint8_t* staged, Index* out,
                                 uint64_t& index) {
    constexpr bool kEscapes = sizeof(Unit) < 8;
    constexpr uint64_t kEscape = codec::kEscape<Unit>;
    constexpr int kOwn = kItems<Unit>, kStep = kThreads * kOwn;
    constexpr int64_t kSize = sizeof(Unit);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t units = (end - at) / kSize;
    if (units * kSize != end - at) return false;
    // A payload that no encoder writes may have any number of escapes; only their sum matters.
    uint64_t written = 0;
    for (int64_t begin = 0; begin < units; begin += kStep) {
      const int here = static_cast<int>(units - begin < kStep ? units - begin : kStep);
      for (int i = thread; i < here * static_cast<int>(kSize); i += kThreads)
        staged[i] = load_cached(at + begin * kSize + i);
      __syncthreads();
      // Read twice: registers for all of them would halve the number of blocks that a multiprocessor runs at once.
      const auto unit = [&](int k, bool& last) {
        const int i = thread * kOwn + k;
        const Unit own = i < here ? codec::load<Unit>(staged + i * kSize) : Unit{0};
        last = i < here && (!kEscapes || own != kEscape);
        return static_cast<uint64_t>(own);
      };
      uint64_t sum = 0, ends = 0, total;
#pragma unroll 4
      for (int k = 0; k < kOwn; ++k) {
        bool last;
        const uint64_t own = unit(k, last);
        sum = kEscapes ? sum + own + last : Saturating{}(sum, Saturating{}(own, last));
        ends += last;
      }
      uint64_t reach, gaps;  // sums over the units before this thread's
      if constexpr (kEscapes) {
        // Both sums in one number: at most 5120 gaps, which together reach less than 2^28.
        const uint64_t before = block_scan(sum << 16 | ends, total, Plain{});
        reach = Saturating{}(index, before >> 16);
        gaps = written + (before & 0xFFFF);
        index = Saturating{}(index, total >> 16);
        written += total & 0xFFFF;
      } else {
        reach = Saturating{}(index, block_scan(sum, total, Saturating{}));
        gaps = static_cast<uint64_t>(begin) + static_cast<uint64_t>(thread) * kOwn;
        index = Saturating{}(index, total);
        written += static_cast<uint64_t>(here);
      }
#pragma unroll 4
      for (int k = 0; k < kOwn; ++k) {
        bool last;
        reach += unit(k, last) + last;
        gaps += last;
        if (last && gaps < static_cast<uint64_t>(n)) out[gaps] = static_cast<Index>(reach);
      }
      __syncthreads();
    }
    if (written != static_cast<uint64_t>(n - 1)) return false;
    return units == 0 || !kEscapes || read<Unit>(end - kSize) != kEscape;
  }

  // The parts of a payload of mode 3 + low into out[1 .. n). The bitmap's ones first: what a gap has above its low bits
  // follows from where its one is. Then the low bits, a thread's 16 gaps after those of the threads before it.
  static __device__ bool rice(const uint8_t* at, const uint8_t* end, int n, int low, uint64_t bound, Index* out,
                              uint64_t& index) {
    const int thread = static_cast<int>(threadIdx.x), gaps = n - 1;
    if (end - at < codec::fewest_rice(gaps, low)) return false;
    const uint8_t* const ones = at + codec::low_bytes(gaps, low);
    const int used = gaps * low % 8;
    if (used != 0 && load_cached(ones - 1) >> used != 0) return false;
    if (gaps == 0 ? ones != end : load_cached(end - 1) == 0) return false;
    const uint64_t first = index, most = (bound - 1 - first) >> low;
    uint64_t found = 0, zeros = 0;
    bool good = true;
    for (int64_t begin = 0; begin < end - ones; begin += kThreads * 8) {
      const int64_t own = begin + static_cast<int64_t>(thread) * 8;
      uint64_t word = 0, total;
      for (int k = 0; k < 8; ++k)
        if (own + k < end - ones) word |= static_cast<uint64_t>(load_cached(ones + own + k)) << 8 * k;
      uint64_t gap = found + block_scan(static_cast<uint64_t>(__popcll(word)), total, Plain{});
      found += total;
      for (; word != 0 && gap < static_cast<uint64_t>(gaps); word &= word - 1, ++gap) {
        const uint64_t before =
            static_cast<uint64_t>(own) * 8 + static_cast<uint64_t>(__popcll((word - 1) & ~word)) - gap;
        good = good && before <= most;
        out[gap + 1] = static_cast<Index>(first + (before << low) + gap + 1);
        if (gap + 1 == static_cast<uint64_t>(gaps)) zeros = before;
      }
    }
    __syncthreads();
    constexpr int kOwn = static_cast<int>(codec::kBlock / kThreads);
    const auto low_of = [&](int gap) {
      const int bit = gap * low;
      uint32_t value = 0;
      for (int k = 0; k < 4; ++k)
        if (at + bit / 8 + k < ones) value |= static_cast<uint32_t>(load_cached(at + bit / 8 + k)) << 8 * k;
      return value >> bit % 8 & ((1u << low) - 1);
    };
    uint64_t sum = 0, lows, all;
    for (int gap = thread * kOwn; gap < thread * kOwn + kOwn && gap < gaps; ++gap) sum += low_of(gap);
    uint64_t reach = block_scan(sum, lows, Plain{});
    for (int gap = thread * kOwn; gap < thread * kOwn + kOwn && gap < gaps; ++gap) {
      reach += low_of(gap);
      out[gap + 1] = static_cast<Index>(static_cast<uint64_t>(out[gap + 1]) + reach);
    }
    block_scan(zeros, all, Plain{});  // of the one thread that had the last gap
    index = first + (all << low) + lows + static_cast<uint64_t>(gaps);
    block_scan(static_cast<uint64_t>(!good), all, Plain{});
    return all == 0 && found == static_cast<uint64_t>(gaps);
  }

  static __device__ bool block(const Row& row, int64_t block, Index* out) {
    SHIRA_SHARED(anchors, 4, uint64_t);  // this block's and the next one's
    SHIRA_SHARED(staged, kStaged, uint8_t);
    SHIRA_SHARED(indices, codec::kBlock, Index);
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t blocks = codec::block_count(row.count);
    const int n = static_cast<int>(codec::block_length(row.count, block));
    const bool last = block + 1 == blocks;
    if (thread < (last ? 1 : 2) * codec::kAnchorBytes)
      reinterpret_cast<uint8_t*>(&anchors[0])[thread] = load_cached(row.code + block * codec::kAnchorBytes + thread);
    __syncthreads();
    const uint64_t bytes = static_cast<uint64_t>(row.bytes - blocks * codec::kAnchorBytes);
    const uint64_t first = anchors[0], start = anchors[1] & codec::kStartMask;
    const uint64_t end = last ? bytes : anchors[3] & codec::kStartMask;
    if (block == 0 && start != 0) return false;
    if (end > bytes || start > end || (!last && start == end) || first >= row.bound) return false;
    if (thread == 0) indices[0] = static_cast<Index>(first);
    const uint8_t* const payloads = row.code + blocks * codec::kAnchorBytes;
    const uint8_t *const from = payloads + start, *const to = payloads + end;
    uint64_t index = first;
    bool good = false;
    switch (anchors[1] >> 56) {
      case codec::kBytes: good = payload<uint8_t>(from, to, n, staged, indices, index); break;
      case codec::kShorts: good = payload<uint16_t>(from, to, n, staged, indices, index); break;
      case codec::kWords: good = payload<uint64_t>(from, to, n, staged, indices, index); break;
      default: {
        const uint64_t low = (anchors[1] >> 56) - codec::kRice;
        if (low <= static_cast<uint64_t>(codec::kMostLow))
          good = rice(from, to, n, static_cast<int>(low), row.bound, indices, index);
      }
    }
    if (!good || index >= row.bound || (!last && anchors[2] <= index)) return false;
    __syncthreads();  // for a block of one index, the first barrier since it was written
    for (int i = thread; i < n; i += kThreads) store_stream(out + i, indices[i]);
    return true;
  }

  static __device__ void tile(const Scalars& scalars, const Row& row, int64_t tile) {
    if (!block(row, tile, scalars.out + tile * codec::kBlock) && threadIdx.x == 0)
      atomicMin(row.refused, static_cast<unsigned long long>(tile));
  }
};

// ---- encode ------------------------------------------------------------------------------------------------

template <typename Unit>
__device__ __forceinline__ uint64_t units_of(uint64_t gap) {
  return sizeof(Unit) == 8 ? 1 : gap / codec::kEscape<Unit> + 1;
}

constexpr int kItems = 8;  // indices per thread in one step
constexpr int kStep = kThreads * kItems;

struct EncodeRow {
  Indices indices;
  int64_t version;
  uint64_t* places;             // for each block, mode << 56 | the size of its payload, later | the payload's start
  unsigned long long* refused;  // the first position that is refused
};

// Which mode each block takes, and the size of its payload in that mode.
struct Measure {
  using Row = EncodeRow;
  struct Scalars {};
  static int64_t tiles(const Row& row) { return codec::block_count(row.indices.count); }

  static __device__ void tile(const Scalars&, const Row& row, int64_t tile) {
    const int64_t begin = tile * codec::kBlock, n = codec::block_length(row.indices.count, tile);
    uint64_t bytes = 0, shorts = 0;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const int64_t index = row.indices[begin + i], before = begin + i > 0 ? row.indices[begin + i - 1] : -1;
      if (index < 0 || index <= before) atomicMin(row.refused, static_cast<unsigned long long>(begin + i));
      if (i == 0) continue;
      const uint64_t gap = static_cast<uint64_t>(index) - static_cast<uint64_t>(before) - 1;
      bytes += units_of<uint8_t>(gap);
      shorts += units_of<uint16_t>(gap);
    }
    block_scan(bytes, bytes, Plain{});
    block_scan(shorts, shorts, Plain{});
    const uint64_t length = static_cast<uint64_t>(n);
    uint64_t mode = codec::kWords, size = 8 * (length - 1);
    if (bytes <= 2 * length)
      mode = codec::kBytes, size = bytes;
    else if (shorts <= 4 * length)
      mode = codec::kShorts, size = 2 * shorts;
    if (row.version == 2 && n > 1) measure_rice(row.indices, begin, n, mode, size);
    if (threadIdx.x == 0) store_stream(row.places + tile, mode << 56 | size);
  }

  // The mode 3 + k that makes the payload the shortest, where it is shorter than `size`.
  static __device__ void measure_rice(const Indices& indices, int64_t begin, int64_t n, uint64_t& mode,
                                      uint64_t& size) {
    constexpr int kOwn = static_cast<int>(codec::kBlock / kThreads);
    const uint64_t gaps = static_cast<uint64_t>(n - 1);
    uint64_t gap[kOwn], wide = 0, total, fewest = kMost;
    int best = 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int64_t i = begin + 1 + threadIdx.x + k * kThreads;
      gap[k] = i < begin + n ? static_cast<uint64_t>(indices[i]) - static_cast<uint64_t>(indices[i - 1]) - 1 : 0;
      wide |= gap[k] >> 32;
    }
    block_scan(static_cast<uint64_t>(wide != 0), total, Plain{});
    if (total != 0) return;
    for (int low = 0; low <= codec::kMostLow; ++low) {
      uint64_t zeros = 0;
#pragma unroll
      for (int k = 0; k < kOwn; ++k) zeros += gap[k] >> low;
      block_scan(zeros, total, Plain{});
      const uint64_t bits = gaps * static_cast<uint64_t>(1 + low) + total;
      if (bits < fewest) fewest = bits, best = low;
    }
    const uint64_t lows = gaps * static_cast<uint64_t>(best);
    const uint64_t bytes = (lows + 7) / 8 + (fewest - lows + 7) / 8;
    if (bytes < size) mode = static_cast<uint64_t>(codec::kRice + best), size = bytes;
  }
};

struct Encode {
  using Row = EncodeRow;
  struct Scalars {
    uint8_t* code;
  };
  static int64_t tiles(const Row& row) { return codec::block_count(row.indices.count); }

  template <typename Unit>
  static __device__ void payload(const Indices& indices, int64_t begin, int64_t n, uint8_t* out) {
    constexpr uint64_t kEscape = codec::kEscape<Unit>;
    for (int64_t step = 1; step < n; step += kStep) {
      uint64_t gap[kItems], units = 0, total;
      const int64_t first = step + static_cast<int64_t>(threadIdx.x) * kItems;
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (first + k >= n) break;
        gap[k] = static_cast<uint64_t>(indices[begin + first + k]) -
                 static_cast<uint64_t>(indices[begin + first + k - 1]) - 1;
        units += units_of<Unit>(gap[k]);
      }
      uint8_t* at = out + block_scan(units, total, Plain{}) * sizeof(Unit);
      out += total * sizeof(Unit);
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        if (first + k >= n) break;
        if constexpr (sizeof(Unit) < 8)
          for (; gap[k] >= kEscape; gap[k] -= kEscape, at += sizeof(Unit)) write(at, static_cast<Unit>(kEscape));
        write(at, static_cast<Unit>(gap[k]));
        at += sizeof(Unit);
      }
    }
  }

  // Mode 3 + low. The low bits of a thread's 16 gaps begin and end with bytes of their own.
  static __device__ void rice(const Indices& indices, int64_t begin, int64_t n, int low, uint8_t* out) {
    constexpr int kOwn = static_cast<int>(codec::kBlock / kThreads);
    SHIRA_SHARED(ones, codec::kBlock, uint32_t);  // where they are in the bitmap, which is shorter than 8 bytes a gap
    const int gaps = static_cast<int>(n) - 1, first = static_cast<int>(threadIdx.x) * kOwn;
    const uint32_t mask = (1u << low) - 1;
    uint8_t* at = out + codec::low_bytes(first, low);
    uint64_t pending = 0, units = 0, total;
    int held = 0;
    for (int k = first; k < first + kOwn && k < gaps; ++k) {
      const uint32_t gap = gap_before(indices, begin + k + 1);
      units += (gap >> low) + 1;
      pending |= static_cast<uint64_t>(gap & mask) << held;
      for (held += low; held >= 8; held -= 8, pending >>= 8) store_stream(at++, static_cast<uint8_t>(pending));
    }
    if (held > 0) store_stream(at, static_cast<uint8_t>(pending));
    uint64_t one = block_scan(units, total, Plain{});
    for (int k = first; k < first + kOwn && k < gaps; ++k) {
      one += gap_before(indices, begin + k + 1) >> low;
      ones[k] = static_cast<uint32_t>(one++);
    }
    uint8_t* const bitmap = out + codec::low_bytes(gaps, low);
    for (uint64_t byte = threadIdx.x; byte < (total + 7) / 8; byte += kThreads) bitmap[byte] = 0;
    __syncthreads();
    // The first one of a byte writes it, for those after it too.
    for (int k = static_cast<int>(threadIdx.x); k < gaps; k += kThreads) {
      const uint32_t byte = ones[k] / 8;
      if (k > 0 && ones[k - 1] / 8 == byte) continue;
      uint32_t bits = 0;
      for (int other = k; other < gaps && ones[other] / 8 == byte; ++other) bits |= 1u << ones[other] % 8;
      bitmap[byte] = static_cast<uint8_t>(bits);
    }
  }
  static __device__ __forceinline__ uint32_t gap_before(const Indices& indices, int64_t i) {
    return static_cast<uint32_t>(static_cast<uint64_t>(indices[i]) - static_cast<uint64_t>(indices[i - 1]) - 1);
  }

  static __device__ void tile(const Scalars& scalars, const Row& row, int64_t tile) {
    const int64_t count = row.indices.count, begin = tile * codec::kBlock, n = codec::block_length(count, tile);
    const uint64_t place = load_stream(row.places + tile);
    uint8_t* const anchor = scalars.code + tile * codec::kAnchorBytes;
    if (threadIdx.x == 0) {
      write(anchor, static_cast<uint64_t>(row.indices[begin]));
      write(anchor + 8, place);
    }
    uint8_t* const out = scalars.code + codec::block_count(count) * codec::kAnchorBytes + (place & codec::kStartMask);
    switch (place >> 56) {
      case codec::kBytes: payload<uint8_t>(row.indices, begin, n, out); break;
      case codec::kShorts: payload<uint16_t>(row.indices, begin, n, out); break;
      case codec::kWords: payload<uint64_t>(row.indices, begin, n, out); break;
      default: rice(row.indices, begin, n, static_cast<int>((place >> 56) - codec::kRice), out); break;
    }
  }
};

struct Cuda {
  template <typename Index>
  static Tensor encode(const Tensor& indices, int64_t version) {
    const int64_t count = indices.numel(), blocks = codec::block_count(count);
    if (count == 0) return torch::stable::new_empty(indices, {0}, ScalarType::Byte);
    const Device device(indices);
    // The places of the blocks, then the first position that is refused.
    const Tensor scratch = torch::stable::new_empty(indices, {blocks + 1}, ScalarType::Long);
    auto* places = address<uint64_t>(scratch);
    const EncodeRow row{indices_of(indices), version, places, reinterpret_cast<unsigned long long*>(places + blocks)};
    SHIRA_CUDA_CHECK(cudaMemsetAsync(row.refused, 0xFF, sizeof(uint64_t), device.stream));
    launch_one<Measure>({}, row, device.stream);
    std::vector<uint64_t> place(static_cast<size_t>(blocks) + 1);
    fetch(place.data(), places, (blocks + 1) * 8, device.stream);
    if (place.back() != kMost) {
      const int64_t at = static_cast<int64_t>(place.back()), n = at == 0 ? 1 : 2;
      Index entries[2];
      fetch(entries, address<const Index>(indices) + at + 1 - n, n * static_cast<int64_t>(sizeof(Index)),
            device.stream);
      refuse(codec::explain_entry(entries[n - 1], entries[0], at));
    }
    uint64_t start = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      uint64_t& own = place[static_cast<size_t>(block)];
      const uint64_t bytes = own & codec::kStartMask;
      own = (own & ~codec::kStartMask) | start;
      start += bytes;
    }
    SHIRA_CUDA_CHECK(
        cudaMemcpyAsync(places, place.data(), static_cast<size_t>(blocks) * 8, cudaMemcpyHostToDevice, device.stream));
    Tensor code = torch::stable::new_empty(indices, {blocks * codec::kAnchorBytes + static_cast<int64_t>(start)},
                                           ScalarType::Byte);
    launch_one<Encode>({address<uint8_t>(code)}, row, device.stream);
    SHIRA_CUDA_CHECK(cudaStreamSynchronize(device.stream));  // the copy reads `place` until then
    return code;
  }

  template <typename Index>
  static Tensor decode(const Tensor& bytes, int64_t count, int64_t granules, ScalarType dtype) {
    codec::Code code{nullptr, bytes.numel(), count, granules, std::numeric_limits<Index>::max()};
    const Device device(bytes);
    std::vector<uint8_t> copy;
    const auto look = [&] {
      copy.resize(static_cast<size_t>(bytes.numel()));
      if (bytes.numel() > 0) fetch(copy.data(), address<const uint8_t>(bytes), bytes.numel(), device.stream);
      code.data = copy.data();
    };
    if (!codec::surely_holds(code)) {
      look();
      if (!codec::holds(code)) refuse(codec::explain_size(code));
    }
    Tensor indices = torch::stable::new_empty(bytes, {count}, dtype);
    if (count == 0) return indices;
    const Tensor scratch = torch::stable::new_empty(bytes, {1}, ScalarType::Long);
    const DecodeRow row{address<const uint8_t>(bytes), bytes.numel(), count, code.bound(),
                        address<unsigned long long>(scratch)};
    SHIRA_CUDA_CHECK(cudaMemsetAsync(row.refused, 0xFF, sizeof(uint64_t), device.stream));
    launch_one<Decode<Index>>({address<Index>(indices)}, row, device.stream);
    uint64_t refused;
    fetch(&refused, row.refused, sizeof(refused), device.stream);
    if (refused == kMost) return indices;
    look();
    refuse(codec::explain_block(code, static_cast<int64_t>(refused)));
  }
};

}  // namespace
}  // namespace shira::cuda

SHIRA_LIBRARY_IMPL(SHIRA_KEY, m) {
  if (!shira::backend_skips_cuda()) shira::CodecOps<shira::cuda::Cuda>::implement(m);
}
