// How kernels read and write: widths, cache hints, packs of entries, and which granule an entry is in.
//
// Indices, values and saved entries are streams: each byte is used once, by neighbouring threads at neighbouring
// addresses, and should not push anything out of the caches (evict-first, .cs). The weight is touched in scattered
// sectors that are also used once, but read and then written: it bypasses L1, whose 128-byte lines would be a quarter
// used, and stays in L2 between the two (.cg). Memory that several threads read goes through L1 (load_cached).
#pragma once
#include "../core/arithmetic.h"
#include "launch.h"

namespace shira::cuda {

#if defined(SHIRA_EMULATE)
struct alignas(16) Sixteen {
  uint64_t x, y;
};
#else
using Sixteen = uint4;
#endif

template <int kBytes>
using Unit = std::conditional_t<
    kBytes == 16, Sixteen,
    std::conditional_t<kBytes == 8, uint64_t,
                       std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 2, uint16_t, uint8_t>>>>;

#if defined(SHIRA_EMULATE)
template <typename T>
inline T load_stream(const T* p) {
  return emul::load(p);
}
template <typename T>
inline T load_weight(const T* p) {
  return emul::load(p);
}
template <typename T>
inline T load_cached(const T* p) {
  return emul::load(p);
}
template <typename T>
inline T load_volatile(const T* p) {
  return emul::load_relaxed(p);
}
template <typename T>
inline void store_volatile(T* p, T value) {
  emul::store_relaxed(p, value);
}
template <typename T>
inline void store_stream(T* p, T value) {
  emul::store(p, value);
}
template <typename T>
inline void store_weight(T* p, T value) {
  emul::store(p, value);
}
#else
template <typename T>
__device__ __forceinline__ T load_stream(const T* p) {
  return __ldcs(p);
}
template <typename T>
__device__ __forceinline__ T load_weight(const T* p) {
  return __ldcg(p);
}
template <typename T>
__device__ __forceinline__ T load_cached(const T* p) {
  return __ldg(p);
}
// For one word that a block writes while another reads it: the reader sees it whole or not at all.
template <typename T>
__device__ __forceinline__ T load_volatile(const T* p) {
  return *static_cast<const volatile T*>(p);
}
template <typename T>
__device__ __forceinline__ void store_volatile(T* p, T value) {
  *static_cast<volatile T*>(p) = value;
}
template <typename T>
__device__ __forceinline__ void store_stream(T* p, T value) {
  __stcs(p, value);
}
template <typename T>
__device__ __forceinline__ void store_weight(T* p, T value) {
  __stcg(p, value);
}
#endif

// The widest unit that divides `bytes` (and 16) and every address: what vector accesses may use.
template <typename... Pointers>
inline int64_t widest_unit(int64_t bytes, const Pointers*... pointers) {
  const uint64_t bits = static_cast<uint64_t>(bytes) | (reinterpret_cast<uintptr_t>(pointers) | ... | 16u);
  return static_cast<int64_t>(bits & (~bits + 1));
}

// f(std::integral_constant<int, unit>{}) for a unit of 1, 2, 4, 8 or 16 bytes.
template <typename F>
auto with_unit(int64_t unit, F&& f) {
  switch (unit) {
    case 16: return f(std::integral_constant<int, 16>{});
    case 8: return f(std::integral_constant<int, 8>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 2: return f(std::integral_constant<int, 2>{});
    default: return f(std::integral_constant<int, 1>{});
  }
}

// A few neighbouring entries, moved in accesses of at most 16 bytes.
template <typename T, int kEntries>
struct Pack {
  static constexpr int kBytes = sizeof(T) * kEntries, kAccess = kBytes < 16 ? kBytes : 16, kParts = kBytes / kAccess;
  using Part = Unit<kAccess>;
  union {
    T entry[kEntries];
    Part part[kParts];
  };

  // Pack number `at` of the memory at p.
  static __device__ __forceinline__ Pack stream(const void* p, int64_t at) {
    Pack pack;
#pragma unroll
    for (int k = 0; k < kParts; ++k) pack.part[k] = load_stream(static_cast<const Part*>(p) + at * kParts + k);
    return pack;
  }
  static __device__ __forceinline__ Pack weight(const void* p, int64_t at) {
    Pack pack;
#pragma unroll
    for (int k = 0; k < kParts; ++k) pack.part[k] = load_weight(static_cast<const Part*>(p) + at * kParts + k);
    return pack;
  }
  static __device__ __forceinline__ Pack cached(const void* p, int64_t at) {
    Pack pack;
#pragma unroll
    for (int k = 0; k < kParts; ++k) pack.part[k] = load_cached(static_cast<const Part*>(p) + at * kParts + k);
    return pack;
  }
  __device__ __forceinline__ void to_stream(void* p, int64_t at) const {
#pragma unroll
    for (int k = 0; k < kParts; ++k) store_stream(static_cast<Part*>(p) + at * kParts + k, part[k]);
  }
  __device__ __forceinline__ void to_weight(void* p, int64_t at) const {
#pragma unroll
    for (int k = 0; k < kParts; ++k) store_weight(static_cast<Part*>(p) + at * kParts + k, part[k]);
  }
};

// A list of granule numbers, int32 or int64. The width is a branch per row, not a kernel of its own: it is the same for
// a whole block, and memory is what a kernel waits for.
struct Indices {
  const void* data;
  int64_t count;
  bool wide;

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return wide ? load_stream(static_cast<const int64_t*>(data) + i)
                : int64_t{load_stream(static_cast<const int32_t*>(data) + i)};
  }
  // For an index that several threads read.
  __device__ __forceinline__ int64_t cached(int64_t i) const {
    return wide ? load_cached(static_cast<const int64_t*>(data) + i)
                : int64_t{load_cached(static_cast<const int32_t*>(data) + i)};
  }
  // Loads several at once. Loads stay in order and below any branch before them: if the first were tested before the
  // second is issued, a thread would wait for each in turn. Here all are in flight at once.
  template <int kItems>
  __device__ __forceinline__ void all(const int64_t (&at)[kItems], int64_t (&index)[kItems]) const {
    if (wide) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) index[k] = load_stream(static_cast<const int64_t*>(data) + at[k]);
    } else {
      int32_t narrow[kItems];
#pragma unroll
      for (int k = 0; k < kItems; ++k) narrow[k] = load_stream(static_cast<const int32_t*>(data) + at[k]);
#pragma unroll
      for (int k = 0; k < kItems; ++k) index[k] = narrow[k];
    }
  }
};
// Also for the offsets of a plan.
inline Indices indices_of(const Tensor& indices) {
  return {address<const void>(indices), indices.numel(), indices.scalar_type() == ScalarType::Long};
}

// Splits a flat list into granules: which granule a unit is in, and which of the granule's units it is.
struct Granule {
  int64_t units;
  int32_t shift;  // log2(units), or -1

  static Granule of(int64_t units) {
    int32_t shift = 0;
    while ((int64_t{1} << shift) < units) ++shift;
    return {units, int64_t{1} << shift == units ? shift : -1};
  }
  __device__ __forceinline__ void split(int64_t unit, int64_t& number, int64_t& offset) const {
    const int64_t units_at[1] = {unit};
    int64_t numbers[1], offsets[1];
    split(units_at, unit, numbers, offsets);
    number = numbers[0];
    offset = offsets[0];
  }
  // Several units, of which `last` is the largest, so that how to divide is decided once.
  template <int kItems>
  __device__ __forceinline__ void split(const int64_t (&unit)[kItems], int64_t last, int64_t (&number)[kItems],
                                        int64_t (&offset)[kItems]) const {
    if (shift >= 0) {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        number[k] = unit[k] >> shift;
        offset[k] = unit[k] & (units - 1);
      }
    } else if ((static_cast<uint64_t>(last) | static_cast<uint64_t>(units)) >> 32 == 0) {
      const uint32_t n = static_cast<uint32_t>(units);  // 32-bit division takes a fifth of the time
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        const uint32_t u = static_cast<uint32_t>(unit[k]);
        number[k] = u / n;
        offset[k] = u % n;
      }
    } else {
#pragma unroll
      for (int k = 0; k < kItems; ++k) {
        number[k] = unit[k] / units;
        offset[k] = unit[k] % units;
      }
    }
  }
};

__device__ __forceinline__ bool within(int64_t index, int64_t limit) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(limit);
}

// A thread's items of a tile, kThreads apart: which granule of the list each is in, which of its units it is, and the
// granule's index. Items past the end repeat the last one, so that no branch comes before all loads are in flight; `is`
// tells them apart.
template <int kItems>
struct Items {
  int64_t first, end, number[kItems], offset[kItems], index[kItems];

  // For items [begin, end) of the list; there is at least one.
  __device__ __forceinline__ Items(const Indices& indices, const Granule& granule, int64_t begin, int64_t end)
      : first(begin + threadIdx.x), end(end) {
    int64_t item[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) item[k] = at(k) < end ? at(k) : end - 1;
    granule.split(item, end, number, offset);
    indices.all(number, index);
  }
  __device__ __forceinline__ int64_t at(int k) const { return first + k * kThreads; }
  __device__ __forceinline__ bool is(int k) const { return at(k) < end; }
};

// How many items a tile has: kItems per thread, or one if all items together do not exceed the threads of the largest
// GPUs (132 multiprocessors of 2048): a second item would only add waiting.
constexpr int64_t kBusy = 132 * 2048;
template <int kItems>
inline int32_t tile_of(int64_t items) {
  return items <= kBusy ? kThreads : kThreads * kItems;
}

}  // namespace shira::cuda
