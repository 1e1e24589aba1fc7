// Every CPU kernel is a walk over (indices, values): this is the walk, which fetches ahead the memory that comes next.
//
// Work is counted in entries of the flat values, so that one huge granule (a whole parameter) spreads over
// threads as well as many small ones. A list of tensors is one walk: a whole model in one parallel region.
#pragma once
#include <cstring>
#include <vector>

#include "../core/hd.h"
#include "indices.h"

namespace shira::cpu {

// Lines that will be written are fetched some entries ahead: the walk is bound by how many misses are in flight.
//
// On Intel's processors they are fetched as if they were only read: asking for them with prefetchw took longer than not
// fetching at all (apply_ of 1 %, bf16, on a Xeon of the fourth generation: 19.7 ms; 18.9 without fetching, 16.3 into
// the first-level cache, 15.4 into the second). A line that no other core has is as good for writing then.
inline bool fetches_like_reads() {
#if SHIRA_X86
  static const bool intel = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") != 0;
  }();
  return intel;
#else
  return false;
#endif
}

// `like_read`: what `fetches_like_reads` says, which loops ask once.
inline void prefetch_write(const void* p, bool like_read) {
  if (like_read) return __builtin_prefetch(p, 0, 2);
#if SHIRA_X86
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));  // a no-op on the oldest x86-64
#else
  __builtin_prefetch(p, 1, 3);
#endif
}
inline void prefetch_read(const void* p) { __builtin_prefetch(p, 0, 3); }

constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 128;  // lines fetched ahead: measured best from 96 to 192, 1.7x better than 32

enum class Fetch { None, Read, Write };

template <Fetch fetch>
inline void prefetch(const char* p, int64_t bytes, bool like_read) {
  for (int64_t at = 0; at < bytes; at += kLine) {
    if constexpr (fetch == Fetch::Write) prefetch_write(p + at, like_read);
    if constexpr (fetch == Fetch::Read) prefetch_read(p + at);
  }
}

// Calls f(byte offset in the weight, first entry of values, entries) for the runs of [begin, end), in order. `ramp`:
// fetch the first lines too, which is not needed where the walk continues an earlier one.
template <int64_t kBytes, Fetch fetch, typename I, typename F>
SHIRA_INLINE void walk(const char* weight, const I* indices, int64_t granule, int64_t begin, int64_t end, int64_t nnz,
                       bool ramp, F&& f) {
  const bool like_read = fetch == Fetch::Write && fetches_like_reads();
  if (granule == 1) {
    if (ramp)
      for (int64_t i = begin; i < std::min(end, begin + kAhead); ++i)
        prefetch<fetch>(weight + int64_t{indices[i]} * kBytes, 1, like_read);
    const int64_t last = fetch == Fetch::None ? begin : std::min(end, nnz - kAhead);
    int64_t i = begin;
    for (; i < last; ++i) {
      prefetch<fetch>(weight + int64_t{indices[i + kAhead]} * kBytes, 1, like_read);
      f(int64_t{indices[i]} * kBytes, i, int64_t{1});
    }
    for (; i < end; ++i) f(int64_t{indices[i]} * kBytes, i, int64_t{1});
    return;
  }
  // The first and the last granule of a chunk may be cut. Huge granules stream: the hardware fetches those.
  const int64_t bytes = granule * kBytes, n = nnz / granule;
  const int64_t ahead = std::max<int64_t>(1, kAhead * kLine / bytes);
  const bool fetching = fetch != Fetch::None && bytes <= kAhead * kLine;
  int64_t number = begin / granule, offset = begin % granule;
  if (fetching && ramp)
    for (int64_t k = number; k < std::min(n, number + ahead); ++k)
      prefetch<fetch>(weight + int64_t{indices[k]} * bytes, bytes, like_read);
  for (int64_t at = begin; at < end; ++number, offset = 0) {
    if (fetching && number + ahead < n)
      prefetch<fetch>(weight + int64_t{indices[number + ahead]} * bytes, bytes, like_read);
    const int64_t length = std::min(granule - offset, end - at);
    f((int64_t{indices[number]} * granule + offset) * kBytes, at, length);
    at += length;
  }
}

// One tensor's share of a call: what its chunk function needs, and how much of it there is.
struct Task {
  void (*chunk)(const Task&, int64_t begin, int64_t end);
  char* weight;
  const void* indices;
  char* values;
  char* saved;
  int64_t granule;
  int64_t total;  // entries to walk
  double alpha;
  int64_t count;  // indices
};

// A family with other arguments has a Task of its own; it needs `chunk` and `total`.
template <typename AnyTask>
inline void run(const AnyTask& task) {
  if (task.total <= kGrain) {
    if (task.total > 0) task.chunk(task, 0, task.total);
    return;
  }
  torch::stable::parallel_for(0, task.total, kGrain, [&](int64_t begin, int64_t end) { task.chunk(task, begin, end); });
}

template <typename AnyTask>
inline void run(const std::vector<AnyTask>& tasks) {
  if (tasks.size() == 1) return run(tasks[0]);
  std::vector<int64_t> starts(tasks.size() + 1, 0);
  for (size_t t = 0; t < tasks.size(); ++t) starts[t + 1] = starts[t] + tasks[t].total;
  const auto work = [&](int64_t begin, int64_t end) {
    size_t t = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; begin < end; ++t) {
      const int64_t stop = std::min(end, starts[t + 1]);
      if (stop > begin) tasks[t].chunk(tasks[t], begin - starts[t], stop - starts[t]);
      begin = std::max(begin, stop);
    }
  };
  if (starts.back() <= kGrain)
    work(0, starts.back());
  else
    torch::stable::parallel_for(0, starts.back(), kGrain, work);
}

}  // namespace shira::cpu
