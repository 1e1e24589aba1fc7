// torch's parallel loops for the thread sanitizer, preloaded beside a build with SHIRA_SANITIZE=thread: on threads that
// it sees start and end, which it cannot of torch's own. Loops are cut at any place, and not where torch cuts them, so
// that neighbours are often written by two threads.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace {
constexpr int kThreads = 4;
thread_local bool inside = false;
thread_local uint64_t state = 0x9E3779B97F4A7C15;

uint64_t random_number() {  // xorshift
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                                                             void (*body)(int64_t, int64_t, void*),
                                                                             void* context) {
  if (begin >= end) return 0;
  if (inside || end - begin == 1) {
    body(begin, end, context);
    return 0;
  }
  std::vector<int64_t> cuts{begin, end};
  for (int k = 1; k < kThreads; ++k)
    cuts.push_back(begin + static_cast<int64_t>(random_number() % static_cast<uint64_t>(end - begin)));
  std::sort(cuts.begin(), cuts.end());
  std::vector<std::exception_ptr> errors(kThreads);
  std::vector<std::thread> threads;
  for (int k = 0; k < kThreads; ++k)
    threads.emplace_back([&, k] {
      inside = true;
      try {
        if (cuts[k] < cuts[k + 1]) body(cuts[k], cuts[k + 1], context);
      } catch (...) {
        errors[k] = std::current_exception();
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) return 1;
  return 0;
}
