// The select family on the CPU: exact top-k without a score tensor, and the random choice.
//
// select_top: a sample of the scores tells a threshold that a little more than k granules reach; one pass over the
// weight keeps those, in order; the exact cut is then found among them alone. Where too many equal the threshold, those
// above it are kept, and the first of the equal ones make up the rest. Where the guess fails (too few reach it) or the
// weight is small, the same search runs over the weight itself: a histogram of the keys' leading bits, then of the next
// bits within the bin that holds the cut. Whichever way, the result is the same; extra memory is O(k), and scores exist
// a block at a time. Where another thread writes to the weight meanwhile, the passes do not agree: then the call is
// refused, and nothing is written outside the result.
#include <atomic>
#include <cmath>
#include <mutex>
#include <numeric>

#include "../dispatch.h"
#include "../ops/select.h"
#include "vector.h"

namespace shira::cpu {
namespace {

using core::Score;

// ---- scores ----------------------------------------------------------------------------------------------

constexpr int64_t kBlock = 1024;            // granules scored at a time: their keys stay in L1
constexpr int64_t kChunkEntries = 1 << 16;  // entries a thread takes at a time

// The keys of a call's granules, made where they are needed.
template <typename Key>
struct Scores {
  void (*score)(const Scores&, int64_t begin, int64_t n, Key* keys);
  const void *weight, *grad;
  int64_t granule, granules;

  int64_t chunk() const { return std::max<int64_t>(1, kChunkEntries / granule); }  // granules
  int64_t chunks() const { return (granules + chunk() - 1) / chunk(); }

  // f(keys, n, index of i) over the blocks of a chunk, in order.
  template <typename F>
  void blocks(int64_t number, const F& f) const {
    Key keys[kBlock];
    const int64_t end = std::min(granules, (number + 1) * chunk());
    for (int64_t begin = number * chunk(); begin < end; begin += kBlock) {
      const int64_t n = std::min(kBlock, end - begin);
      score(*this, begin, n, keys);
      f(keys, n, [=](int64_t i) { return begin + i; });
    }
  }
};

template <typename W, typename G, Score score>
void score_granules(const Scores<core::Key<typename W::Compute>>& call, int64_t first, int64_t n,
                    core::Key<typename W::Compute>* keys) {
  const int64_t granule = call.granule;
  const auto* weight = static_cast<const typename W::Bits*>(call.weight) + first * granule;
  const auto* grad = call.grad == nullptr ? nullptr : static_cast<const typename G::Bits*>(call.grad) + first * granule;
  if (granule == 1) {
    vector_loop(n, [=](int64_t i) { keys[i] = core::score_key(core::entry_score<W, G, score>(weight, grad, i)); });
    return;
  }
  // Entries are scored as wide as the processor goes, and then summed in order.
  typename W::Compute entries[kBlock], total = 0;
  int64_t left = granule;  // entries of the granule that is being summed
  for (int64_t begin = 0; begin < n * granule; begin += kBlock) {
    const int64_t size = std::min(kBlock, n * granule - begin);
    vector_loop(size, [=, entries = &entries[0]](int64_t i) {
      entries[i] = core::entry_score<W, G, score>(weight, grad, begin + i);
    });
    for (int64_t at = 0; at < size;) {
      const int64_t end = at + std::min(left, size - at);
      left -= end - at;
      for (; at < end; ++at) total += entries[at];
      if (left > 0) break;
      *keys++ = core::score_key(total);
      total = 0;
      left = granule;
    }
  }
}

// ---- where keys reach a threshold --------------------------------------------------------------------------

// Positions i of [0, n) with keys[i] >= least, ascending; `at` has room for one more vector. n <= kBlock.
template <typename Key>
int64_t reaching_portable(const Key* keys, int64_t begin, int64_t n, Key least, int32_t* at, int64_t found) {
  for (int64_t i = begin; i < n; ++i) {
    at[found] = static_cast<int32_t>(i);
    found += keys[i] >= least;
  }
  return found;
}

#if SHIRA_X86
template <typename Key>
SHIRA_AVX2 int64_t reaching_avx2(const Key* keys, int64_t n, Key least, int32_t* at) {
  constexpr int64_t kLanes = 32 / sizeof(Key);
  int64_t i = 0, found = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    uint32_t below;
    if constexpr (sizeof(Key) == 4)
      below = static_cast<uint32_t>(
          _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(least), some))));
    else
      below = static_cast<uint32_t>(
          _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_set1_epi64x(least), some))));
    for (uint32_t lanes = ~below & ((1u << kLanes) - 1); lanes != 0; lanes &= lanes - 1)
      at[found++] = static_cast<int32_t>(i + __builtin_ctz(lanes));
  }
  return reaching_portable(keys, i, n, least, at, found);
}

template <typename Key>
SHIRA_AVX512 int64_t reaching_avx512(const Key* keys, int64_t n, Key least, int32_t* at) {
  constexpr int64_t kLanes = 64 / sizeof(Key);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  int64_t i = 0, found = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const __m512i some = _mm512_loadu_si512(keys + i);
    uint32_t lanes;
    if constexpr (sizeof(Key) == 4)
      lanes = _mm512_cmpge_epi32_mask(some, _mm512_set1_epi32(least));
    else
      lanes = _mm512_cmpge_epi64_mask(some, _mm512_set1_epi64(least));
    if (lanes == 0) continue;
    const __m512i positions = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(i)));
    // Compressed in a register: straight to memory it is many times slower on some processors.
    _mm512_storeu_si512(at + found, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), positions));
    found += __builtin_popcount(lanes);
  }
  return reaching_portable(keys, i, n, least, at, found);
}
#endif

// Room for the positions of a block.
struct Positions {
  int32_t at[kBlock + 16];
  template <typename Key>
  int64_t reaching(const Key* keys, int64_t n, Key least) {
#if SHIRA_X86
    if (core::widest() == core::Width::Avx512) return reaching_avx512(keys, n, least, at);
    if (core::widest() == core::Width::Avx2) return reaching_avx2(keys, n, least, at);
#endif
    return reaching_portable(keys, 0, n, least, at, 0);
  }
};

// ---- the candidates: granules that reach a guessed threshold -------------------------------------------------

template <typename Key>
struct Candidates {
  struct Chunk {
    std::vector<Key> keys;
    std::vector<int32_t> offsets;  // from the chunk's first granule
  };
  std::vector<Chunk> all;
  int64_t granules;  // in a chunk

  int64_t chunks() const { return static_cast<int64_t>(all.size()); }
  int64_t count() const {
    int64_t total = 0;
    for (const Chunk& chunk : all) total += static_cast<int64_t>(chunk.keys.size());
    return total;
  }

  template <typename F>
  void blocks(int64_t number, const F& f) const {
    const Chunk& chunk = all[number];
    const int64_t total = static_cast<int64_t>(chunk.keys.size());
    for (int64_t begin = 0; begin < total; begin += kBlock) {
      const int32_t* offsets = chunk.offsets.data() + begin;
      f(chunk.keys.data() + begin, std::min(kBlock, total - begin),
        [=, first = number * granules](int64_t i) { return first + offsets[i]; });
    }
  }
};

constexpr int64_t kSample = 1 << 14;

// One granule out of each of kSample equal stretches, anywhere in it: a stride could meet a pattern of the weight.
template <typename Key>
Key guess_threshold(const Scores<Key>& scores, int64_t rank) {
  std::vector<Key> sample(kSample);
  for (int64_t s = 0; s < kSample; ++s) {
    const int64_t begin = scores.granules / kSample * s + scores.granules % kSample * s / kSample;
    const int64_t place = core::splitmix64(s) % (scores.granules / kSample);
    scores.score(scores, begin + static_cast<int64_t>(place), 1, &sample[s]);
  }
  std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<Key>());
  return sample[rank];
}

// A key that a little more than k granules reach, guessed from a sample; nothing if the weight is too small for one.
template <typename Key>
std::optional<Key> guess(const Scores<Key>& scores, int64_t k) {
  if (scores.granules < 2 * kSample) return std::nullopt;
  // Four standard deviations above the rank that k has in the sample: one guess in 30,000 falls short.
  const double expected = static_cast<double>(kSample) * k / scores.granules;
  const int64_t rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
  return rank < kSample ? guess_threshold(scores, rank) : Key{0};
}

// All granules that reach `least`, unless they are more than O(k). `next`: how many in each chunk have `least - 1`.
template <typename Key>
std::optional<Candidates<Key>> candidates(const Scores<Key>& scores, int64_t k, Key least,
                                          std::vector<int64_t>* next = nullptr) {
  const int64_t most = 4 * k + (int64_t{1} << 16);
  Candidates<Key> found{std::vector<typename Candidates<Key>::Chunk>(scores.chunks()), scores.chunk()};
  std::atomic<int64_t> total{0};
  torch::stable::parallel_for(0, found.chunks(), 1, [&](int64_t begin, int64_t end) {
    Positions positions;
    for (int64_t number = begin; number < end && total.load(std::memory_order_relaxed) <= most; ++number) {
      auto& chunk = found.all[number];
      const int64_t first = number * found.granules;
      scores.blocks(number, [&](const Key* keys, int64_t n, const auto& index) {
        const int64_t count = positions.reaching(keys, n, least);
        const size_t had = chunk.keys.size();
        chunk.keys.resize(had + count);
        chunk.offsets.resize(had + count);
        for (int64_t j = 0; j < count; ++j) {
          chunk.keys[had + j] = keys[positions.at[j]];
          chunk.offsets[had + j] = static_cast<int32_t>(index(positions.at[j]) - first);
        }
        if (next != nullptr) {
          int32_t equal = 0;
          for (int64_t i = 0; i < n; ++i) equal += keys[i] == least - 1;
          (*next)[number] += equal;
        }
      });
      total += static_cast<int64_t>(chunk.keys.size());
    }
  });
  if (total > most) return std::nullopt;
  return found;
}

// ---- what another thread writes meanwhile ------------------------------------------------------------------------

[[noreturn]] void refuse_written() { refuse("select_top: weight and grad must not be written to while they are read"); }

// The part of the result that a chunk fills: as long as an earlier pass has counted.
template <typename Index>
struct Share {
  Index *next, *end;
  bool over = false;

  void put(int64_t granule) {
    if (next < end)
      *next++ = static_cast<Index>(granule);
    else
      over = true;
  }
  bool is_filled() const { return next == end && !over; }
};

// ---- the cut -------------------------------------------------------------------------------------------------

// All keys above `key` are selected, and the first `ties` of those equal to it.
template <typename Key>
struct Cut {
  Key key;
  int64_t ties;
};

constexpr int kDigit = 11, kBins = 1 << kDigit;

// The k-th highest key (k >= 1, at most what `source` has), digit by digit from the top.
template <typename Key, typename Source>
Cut<Key> find_cut(const Source& source, int64_t k) {
  using Bits = std::make_unsigned_t<Key>;
  Key base = 0;  // the digits found so far: the cut is in [base, base + 2^(shift + kDigit))
  for (int shift = sizeof(Key) == 4 ? 2 * kDigit : 5 * kDigit;; shift -= kDigit) {
    std::vector<int64_t> histogram(kBins);
    std::mutex merging;
    torch::stable::parallel_for(0, source.chunks(), 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> own(kBins);
      for (int64_t number = begin; number < end; ++number)
        source.blocks(number, [&](const Key* keys, int64_t n, const auto&) {
          for (int64_t i = 0; i < n; ++i) {
            const Bits bin = static_cast<Bits>(keys[i] - base) >> shift;
            if (bin < kBins) ++own[bin];
          }
        });
      const std::lock_guard<std::mutex> lock(merging);
      for (int bin = 0; bin < kBins; ++bin) histogram[bin] += own[bin];
    });
    int bin = kBins - 1;
    for (; bin >= 0 && histogram[bin] < k; --bin) k -= histogram[bin];
    if (bin < 0) refuse_written();
    base += static_cast<Key>(bin) << shift;
    if (histogram[bin] == k) return {base - 1, 0};  // the whole bin
    if (shift == 0) return {base, k};
  }
}

// The selected granules in ascending order: chunks are counted, and then each writes where it belongs.
template <typename Index, typename Key, typename Source>
void write_selected(const Source& source, Cut<Key> cut, int64_t k, Index* out) {
  struct Counts {
    int64_t above, ties;
  };
  std::vector<Counts> counts(source.chunks());
  const auto walk = [&](const auto& f) {
    torch::stable::parallel_for(0, source.chunks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) f(number);
    });
  };
  walk([&](int64_t number) {
    Counts own{0, 0};
    source.blocks(number, [&](const Key* keys, int64_t n, const auto&) {
      for (int64_t i = 0; i < n; ++i) {
        own.above += keys[i] > cut.key;
        own.ties += keys[i] == cut.key;
      }
    });
    counts[number] = own;
  });
  Counts before{0, 0};
  for (Counts& chunk : counts) {
    const Counts own = chunk;
    chunk = before;
    before.above += own.above;
    before.ties += own.ties;
  }
  counts.push_back(before);
  const auto place = [&](int64_t number) { return counts[number].above + std::min(counts[number].ties, cut.ties); };
  if (place(source.chunks()) != k) refuse_written();
  std::atomic<bool> written{false};
  walk([&](int64_t number) {
    int64_t ties = counts[number].ties;
    Share<Index> share{out + place(number), out + place(number + 1)};
    Positions positions;
    source.blocks(number, [&](const Key* keys, int64_t n, const auto& index) {
      const int64_t count = positions.reaching(keys, n, cut.key);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t i = positions.at[j];
        if (keys[i] == cut.key && ties++ >= cut.ties) continue;
        share.put(index(i));
      }
    });
    if (!share.is_filled()) written = true;
  });
  if (written) refuse_written();
}

template <typename Key, typename Source>
void select_from(const Source& source, int64_t k, const Tensor& indices) {
  const Cut<Key> cut = find_cut<Key>(source, k);
  with_index(indices.scalar_type(), [&](auto index) {
    using Index = typename decltype(index)::type;
    write_selected(source, cut, k, indices.mutable_data_ptr<Index>());
  });
}

// All of `above` and, up to k, the first granules with key `equal`, of which chunk i has equals[i]. Only the chunks
// that have some of those are looked at again.
template <typename Index, typename Key>
void write_with_equals(const Scores<Key>& scores, const Candidates<Key>& above, Key equal,
                       const std::vector<int64_t>& equals, int64_t k, Index* out) {
  struct Place {
    int64_t begin, equals, end;  // of the chunk's outputs; how many equal ones are among them
  };
  std::vector<Place> places;
  int64_t left = k - above.count(), begin = 0;
  for (int64_t number = 0; number < scores.chunks(); ++number) {
    const int64_t own = std::min(left, equals[number]);
    const int64_t end = begin + own + static_cast<int64_t>(above.all[number].keys.size());
    places.push_back({begin, own, end});
    left -= own;
    begin = end;
  }
  std::atomic<bool> written{false};
  torch::stable::parallel_for(0, scores.chunks(), 1, [&](int64_t from, int64_t to) {
    Positions positions;
    for (int64_t number = from; number < to; ++number) {
      Share<Index> share{out + places[number].begin, out + places[number].end};
      int64_t quota = places[number].equals;
      if (quota == 0) {
        for (const int32_t offset : above.all[number].offsets) share.put(number * above.granules + offset);
        continue;
      }
      scores.blocks(number, [&](const Key* keys, int64_t n, const auto& index) {
        const int64_t count = positions.reaching(keys, n, equal);
        for (int64_t j = 0; j < count; ++j) {
          const int64_t i = positions.at[j];
          if (keys[i] == equal && quota-- <= 0) continue;
          share.put(index(i));
        }
      });
      if (!share.is_filled()) written = true;
    }
  });
  if (written) refuse_written();
}

// ---- select_top ------------------------------------------------------------------------------------------------

template <typename W, typename G, Score score>
void top(const Tensor& weight, const Tensor* grad, int64_t k, int64_t granule, const Tensor& indices) {
  using Key = core::Key<typename W::Compute>;
  const Scores<Key> scores{&score_granules<W, G, score>, weight.const_data_ptr(),
                           grad == nullptr ? nullptr : grad->const_data_ptr(), granule, weight.numel() / granule};
  if (const std::optional<Key> least = guess(scores, k)) {
    if (const auto found = candidates(scores, k, *least)) {
      if (found->count() >= k) return select_from<Key>(*found, k, indices);
    } else {  // too many, most often of equal scores
      std::vector<int64_t> equals(scores.chunks());
      const auto above = candidates<Key>(scores, k, *least + 1, &equals);
      const int64_t count = above ? above->count() : 0, all = count + std::reduce(equals.begin(), equals.end());
      if (above && count >= k) return select_from<Key>(*above, k, indices);
      if (above && all >= k)
        return with_index(indices.scalar_type(), [&](auto index) {
          using Index = typename decltype(index)::type;
          write_with_equals(scores, *above, *least, equals, k, indices.mutable_data_ptr<Index>());
        });
    }
  }
  select_from<Key>(scores, k, indices);
}

struct Cpu {
  static void random(const core::Permutation& permutation, Tensor& indices);  // further down
  static Tensor top(const Tensor& weight, const Tensor* grad, int64_t k, Score score, int64_t granule) {
    const Tensor indices = torch::stable::new_empty(weight, {k}, index_type(weight.numel() / granule));
    if (k == 0) return indices;
    const ScalarType gradient = (grad == nullptr ? weight : *grad).scalar_type();
    with_dtypes(weight.scalar_type(), gradient, [&](auto w, auto g) {
      using W = typename decltype(w)::type;
      using G = typename decltype(g)::type;
      switch (score) {
        case Score::Magnitude: return cpu::top<W, W, Score::Magnitude>(weight, nullptr, k, granule, indices);
        case Score::Grad: return cpu::top<W, G, Score::Grad>(weight, grad, k, granule, indices);
        case Score::Snip: return cpu::top<W, G, Score::Snip>(weight, grad, k, granule, indices);
      }
    });
    return indices;
  }
};

// ---- select_random -----------------------------------------------------------------------------------------------

// The images of [begin, end), unsorted.
template <typename Index>
void draw(const core::Permutation& permutation, int64_t begin, int64_t end, Index* out) {
  uint64_t block[kBlock];
  int32_t outside[kBlock];
  for (; begin < end; begin += kBlock) {
    const int64_t n = std::min(kBlock, end - begin);
    vector_loop(n, [=, permute = permutation, block = &block[0]](int64_t i) {
      block[i] = permute(static_cast<uint64_t>(begin + i));
    });
    // Images outside the domain are permuted again, together.
    uint64_t walking[kBlock];
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      outside[left] = static_cast<int32_t>(i);
      walking[left] = block[i];
      left += block[i] >= permutation.domain;
    }
    while (left > 0) {
      vector_loop(left,
                  [permute = permutation, walking = &walking[0]](int64_t i) { walking[i] = permute(walking[i]); });
      int64_t still = 0;
      for (int64_t i = 0; i < left; ++i) {
        const uint64_t image = walking[i];
        block[outside[i]] = image;
        outside[still] = outside[i];
        walking[still] = image;
        still += image >= permutation.domain;
      }
      left = still;
    }
    for (int64_t i = 0; i < n; ++i) out[begin + i] = static_cast<Index>(block[i]);
  }
}

// Distinct numbers of [0, domain) in ascending order, in O(n) memory: marked in a bitmap where that is small beside
// them, else by radix.
template <typename Index>
void sort_distinct(Index* p, int64_t n, uint64_t domain) {
  if (domain / 256 <= static_cast<uint64_t>(n)) {
    std::vector<uint64_t> marks(domain / 64 + 1);
    for (int64_t i = 0; i < n; ++i) marks[p[i] / 64] |= uint64_t{1} << (p[i] % 64);
    for (size_t w = 0; w < marks.size(); ++w)
      for (uint64_t word = marks[w]; word != 0; word &= word - 1)
        *p++ = static_cast<Index>(static_cast<int64_t>(w) * 64 + __builtin_ctzll(word));
    return;
  }
  std::vector<Index> other(n);
  Index *from = p, *to = other.data();
  for (int shift = 0; shift < 64 && ((domain - 1) >> shift) != 0; shift += kDigit, std::swap(from, to)) {
    int64_t starts[kBins] = {}, sum = 0;
    for (int64_t i = 0; i < n; ++i) ++starts[(from[i] >> shift) % kBins];
    for (int64_t& start : starts) sum += std::exchange(start, sum);
    for (int64_t i = 0; i < n; ++i) to[starts[(from[i] >> shift) % kBins]++] = from[i];
  }
  if (from != p) std::copy(from, from + n, p);
}

template <typename Index>
void random(const core::Permutation& permutation, const Tensor& indices) {
  Index* out = indices.mutable_data_ptr<Index>();
  const int64_t k = indices.numel();
  torch::stable::parallel_for(0, k, 4 * kBlock,
                              [&](int64_t begin, int64_t end) { draw(permutation, begin, end, out); });
  sort_distinct(out, k, permutation.domain);
}

void Cpu::random(const core::Permutation& permutation, Tensor& indices) {
  with_index(indices.scalar_type(),
             [&](auto index) { cpu::random<typename decltype(index)::type>(permutation, indices); });
}

// A GPU computes the choice itself, with the same bits; any other device gets the CPU's.
Tensor select_random(int64_t numel, int64_t k, int64_t seed, std::optional<torch::stable::Device> device,
                     int64_t granule) {
  check_select_random(numel, k, granule);
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const bool elsewhere = device.has_value() && !device->is_cpu();
  if (elsewhere && device->is_cuda())
    return select_random_on(SHIRA_OP("_select_random"), *device, numel, k, seed, granule);
  const Tensor indices = select_random_on(SHIRA_OP("_select_random"), cpu, numel, k, seed, granule);
  return elsewhere ? torch::stable::to(indices, *device) : indices;
}

}  // namespace
}  // namespace shira::cpu

SHIRA_LIBRARY_IMPL(CPU, m) {
  if (shira::backend_is_reference()) return;
  shira::SelectOps<shira::cpu::Cpu>::implement(m);
}

// No tensor argument gives the device: `device` does.
SHIRA_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("select_random", TORCH_BOX(&shira::cpu::select_random)); }
