// The diff family on the CPU: one pass at the speed of reading both.
//
// The weights are cut into chunks that stay in L2. A thread compares a chunk (core/difference.h), keeps what it found,
// and only then refreshes the snapshot there. What the snapshot held is kept too until the results have their memory:
// if there is none, the snapshots are put back, and no change is lost.
#include <atomic>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "../core/difference.h"
#include "../ops/diff.h"
#include "../ops/select.h"
#include "walk.h"

namespace shira::cpu {
namespace {

constexpr int64_t kChunkBytes = 64 << 10;  // a chunk has at most this many units
constexpr int64_t kWideGranule = 64;       // a granule of at least this many bytes is compared as a whole

// A range of granules of one weight, and what was found there.
struct Chunk {
  size_t tensor;
  int64_t begin, end;
  int64_t count = 0;
  std::unique_ptr<int32_t[]> granules;       // counted from `begin`
  std::unique_ptr<char[]> values, previous;  // the weight's entries and the snapshot's
};

// Puts the granules of a chunk whose bits differ into `found`, which has room for every unit of the chunk.
template <typename Unit>
int64_t differing(const uint8_t* snapshot, const uint8_t* weight, int64_t granules, int64_t bytes, int32_t* found) {
  const int64_t units = bytes / static_cast<int64_t>(sizeof(Unit));
  const int64_t n = core::differing<Unit>(snapshot, weight, 0, granules * units, found);
  if (units == 1) return n;
  // Replaces units by the granules they lie in, in place: writing never gets ahead of reading.
  int64_t kept = 0;
  int32_t last = -1;
  for (int64_t k = 0; k < n; ++k) {
    const int32_t granule = found[k] / static_cast<int32_t>(units);
    found[kept] = granule;
    kept += granule != last;
    last = granule;
  }
  return kept;
}
int64_t differing(const uint8_t* snapshot, const uint8_t* weight, int64_t granules, int64_t bytes, int32_t* found) {
  if (bytes >= kWideGranule) {
    int64_t kept = 0;
    for (int64_t k = 0; k < granules; ++k) {
      found[kept] = static_cast<int32_t>(k);
      kept += memcmp(snapshot + k * bytes, weight + k * bytes, bytes) != 0;
    }
    return kept;
  }
  switch (bytes & -bytes) {
    case 1: return differing<uint8_t>(snapshot, weight, granules, bytes, found);
    case 2: return differing<uint16_t>(snapshot, weight, granules, bytes, found);
    case 4: return differing<uint32_t>(snapshot, weight, granules, bytes, found);
    default: return differing<uint64_t>(snapshot, weight, granules, bytes, found);
  }
}

// Copies `bytes` for each k of `count`, to and from where `place(k)` says; a constant size is copied without a call.
template <typename Place>
void copy_each(int64_t count, int64_t bytes, const Place& place) {
  const auto all = [&](auto size) {
    for (int64_t k = 0; k < count; ++k) {
      const auto [to, from] = place(k);
      memcpy(to, from, size);
    }
  };
  switch (bytes) {
    case 1: return all(std::integral_constant<size_t, 1>{});
    case 2: return all(std::integral_constant<size_t, 2>{});
    case 4: return all(std::integral_constant<size_t, 4>{});
    case 8: return all(std::integral_constant<size_t, 8>{});
    default: return all(static_cast<size_t>(bytes));
  }
}
void take(char* to, const char* from, const int32_t* granules, int64_t count, int64_t bytes) {
  copy_each(count, bytes, [=](int64_t k) { return std::pair(to + k * bytes, from + granules[k] * bytes); });
}
void put(char* to, const char* from, const int32_t* granules, int64_t count, int64_t bytes) {
  copy_each(count, bytes, [=](int64_t k) { return std::pair(to + granules[k] * bytes, from + k * bytes); });
}

// f(chunk) for all of them, on torch's threads.
template <typename F>
void each(std::vector<Chunk>& chunks, const F& f) {
  const auto n = static_cast<int64_t>(chunks.size());
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) f(chunks[c]);
  });
}

// Keeps what differs in a chunk, then refreshes the snapshot there: in this order, since there may be no memory to keep
// it.
void compare(Chunk& chunk, char* snapshot, const char* weight, int64_t bytes, int32_t* found) {
  char* const old = snapshot + chunk.begin * bytes;
  const char* const now = weight + chunk.begin * bytes;
  const int64_t count = differing(reinterpret_cast<const uint8_t*>(old), reinterpret_cast<const uint8_t*>(now),
                                  chunk.end - chunk.begin, bytes, found);
  if (count == 0) return;
  chunk.granules.reset(new int32_t[count]);
  chunk.values.reset(new char[count * bytes]);
  chunk.previous.reset(new char[count * bytes]);
  std::copy_n(found, count, chunk.granules.get());
  take(chunk.values.get(), now, found, count, bytes);
  take(chunk.previous.get(), old, found, count, bytes);
  put(old, chunk.values.get(), found, count, bytes);
  chunk.count = count;
}

struct Cpu {
  static std::tuple<Tensors, Tensors> diff(const char* op, const Tensors& snapshots, const Tensors& weights,
                                           int64_t granule, bool before) {
    std::vector<char*> olds;
    std::vector<const char*> news;
    std::vector<int64_t> sizes;  // of a granule, in bytes
    std::vector<Chunk> chunks;
    for (size_t t = 0; t < weights.size(); ++t) {
      olds.push_back(static_cast<char*>(snapshots[t].data_ptr()));
      news.push_back(static_cast<const char*>(weights[t].const_data_ptr()));
      sizes.push_back(granule * static_cast<int64_t>(weights[t].element_size()));
      const int64_t granules = weights[t].numel() / granule, step = std::max<int64_t>(1, kChunkBytes / sizes[t]);
      for (int64_t begin = 0; begin < granules; begin += step)
        chunks.push_back({t, begin, std::min(granules, begin + step), 0, nullptr, nullptr, nullptr});
    }

    // An exception raised in the pool would lose its message.
    std::atomic<bool> failed{false};
    torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
      try {
        const std::unique_ptr<int32_t[]> found(new int32_t[kChunkBytes]);
        for (int64_t c = begin; c < end && !failed.load(std::memory_order_relaxed); ++c) {
          const size_t t = chunks[c].tensor;
          compare(chunks[c], olds[t], news[t], sizes[t], found.get());
        }
      } catch (const std::bad_alloc&) {
        failed.store(true);
      }
    });

    const auto put_back = [&] {
      each(chunks, [&](Chunk& chunk) {
        if (chunk.count == 0) return;
        const int64_t bytes = sizes[chunk.tensor];
        put(olds[chunk.tensor] + chunk.begin * bytes, chunk.previous.get(), chunk.granules.get(), chunk.count, bytes);
      });
    };
    if (failed.load()) {
      put_back();
      refuse(op, ": no memory for what differs; nothing has changed");
    }

    Tensors indices, values;
    std::vector<int64_t> places;  // where each chunk begins in its tensor's results
    try {
      places.reserve(chunks.size());
      size_t next = 0;
      for (size_t t = 0; t < weights.size(); ++t) {
        int64_t count = 0;
        for (; next < chunks.size() && chunks[next].tensor == t; ++next) {
          places.push_back(count);
          count += chunks[next].count;
        }
        const ScalarType index = index_type(weights[t].numel() / granule);
        indices.push_back(torch::stable::new_empty(weights[t], {count}, index));
        values.push_back(torch::stable::new_empty(weights[t], {count * granule}));
      }
    } catch (...) {
      put_back();
      throw;
    }
    each(chunks, [&](Chunk& chunk) {
      if (chunk.count == 0) return;
      const size_t t = chunk.tensor;
      const int64_t place = places[&chunk - chunks.data()], bytes = sizes[t];
      if (indices[t].scalar_type() == ScalarType::Int) {
        auto* const out = indices[t].mutable_data_ptr<int32_t>() + place;
        for (int64_t k = 0; k < chunk.count; ++k) out[k] = static_cast<int32_t>(chunk.begin) + chunk.granules[k];
      } else {
        auto* const out = indices[t].mutable_data_ptr<int64_t>() + place;
        for (int64_t k = 0; k < chunk.count; ++k) out[k] = chunk.begin + chunk.granules[k];
      }
      const char* const entries = before ? chunk.previous.get() : chunk.values.get();
      memcpy(static_cast<char*>(values[t].data_ptr()) + place * bytes, entries, chunk.count * bytes);
    });
    return {indices, values};
  }
};

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (!shira::backend_is_reference()) shira::DiffOps<shira::cpu::Cpu>::implement(m);
}
