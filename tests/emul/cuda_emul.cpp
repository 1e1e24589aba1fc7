#include "cuda_emul.h"

#include <sys/mman.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace shira::emul {

Grid grid;
constexpr size_t kMostRest = 227 << 10;  // on an H100
int64_t most_shared = kMostRest;
bool capturing = false;
thread_local cudaError_t last_error = cudaSuccess;

namespace {

// ---- fibers --------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Switches between stacks. ucontext makes a system call for each switch, which would take most of the time.
using Context = void*;
extern "C" void shira_emul_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden shira_emul_switch
.globl shira_emul_switch
.type shira_emul_switch, @function
shira_emul_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shira_emul_switch, .-shira_emul_switch
)");
void switch_to(Context& from, Context& to) { shira_emul_switch(&from, to); }
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes) - 2;
  top[0] = reinterpret_cast<void*>(entry);  // where `ret` goes; above it, the address to which entry would return
  top[1] = nullptr;
  context = top - 6;  // six registers
  std::fill(top - 6, top, nullptr);
}
#else
using Context = ucontext_t;
void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State { Ready, AtBlock, AtWarp, Done };

struct Fiber : Thread {
  Context context{};
  char* stack = nullptr;
  State state = State::Ready;
  const char* at = nullptr;  // the warp operation it waits in
};

constexpr size_t kStack = 256 << 10;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kMostShared = 48 << 10;

constexpr size_t kRedZone = 128;  // behind each shared array
constexpr char kRed = 0x5A;

struct Shared {
  const void* site;
  size_t offset, bytes;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<uint64_t> received;  // 32 per warp
  std::vector<char*> stacks;       // those that no fiber uses now
  Context scheduler{};
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;
  std::vector<Shared> sites;
  size_t shared_rest = 0;  // what the launch asked for: the first array
  size_t shared_used = 0;
  size_t shared_real = 0;  // without red zones and the rest
  alignas(128) char shared[2 * kMostShared + kMostRest + 2 * kRedZone];
};
Block block;
std::mutex running;
int64_t order_of_threads = 2;
int64_t launched = 0;

void leave(State state) {
  auto* me = static_cast<Fiber*>(grid.current);
  me->state = state;
  switch_to(me->context, block.scheduler);
}

void entry() {
  try {
    (*block.kernel)();
  } catch (...) {
    block.error = std::current_exception();
  }
  leave(State::Done);
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "emulated CUDA: ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

char* new_stack() {
  if (!block.stacks.empty()) {
    char* stack = block.stacks.back();
    block.stacks.pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for a fiber's stack");
  return static_cast<char*>(memory);
}

void resume(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = new_stack();
    prepare(fiber.context, fiber.stack, kStack, entry);
  }
  grid.current = &fiber;
  switch_to(block.scheduler, fiber.context);
  grid.current = nullptr;
  if (fiber.state == State::Done) block.stacks.push_back(std::exchange(fiber.stack, nullptr));
  if (block.error) std::rethrow_exception(std::exchange(block.error, nullptr));
}

// Resumes the lanes of a warp that wait in an operation which all of its lanes have reached.
bool release_warp(unsigned warp) {
  const unsigned begin = warp * 32, end = std::min<unsigned>(begin + 32, static_cast<unsigned>(block.fibers.size()));
  bool released = false;
  for (unsigned first = begin; first < end; ++first) {
    Fiber& one = block.fibers[first];
    if (one.state != State::AtWarp) continue;
    uint32_t arrived = 0;
    for (unsigned i = begin; i < end; ++i) {
      const Fiber& other = block.fibers[i];
      if (other.state != State::AtWarp || !(one.mask >> other.lane & 1)) continue;
      if (other.mask != one.mask || other.at != one.at)
        fail("lanes ", one.lane, " and ", other.lane, " of a warp meet in ", one.at, " and ", other.at,
             " with masks 0x", std::hex, one.mask, " and 0x", other.mask);
      arrived |= 1u << other.lane;
    }
    if (arrived != one.mask) continue;
    for (unsigned i = begin; i < end; ++i) {
      Fiber& other = block.fibers[i];
      if (!(arrived >> other.lane & 1)) continue;
      block.received[i] = other.sent;
      other.received = &block.received[begin];
      other.state = State::Ready;
    }
    released = true;
  }
  return released;
}

void* shared_array(const void* site, size_t bytes) {
  const size_t offset = block.shared_used;
  block.shared_used += (bytes + kRedZone + 127) / 128 * 128;
  if (block.shared_used > sizeof(block.shared)) fail("a block has too many shared arrays");
  block.sites.push_back({site, offset, bytes});
  std::memset(block.shared + offset, 0xCD, bytes);
  std::memset(block.shared + offset + bytes, kRed, kRedZone);
  return block.shared + offset;
}

// Checks that nothing was written past the end of a shared array, up to the start of the next.
void check_red_zones() {
  for (const Shared& shared : block.sites) {
    const char* const end = block.shared + shared.offset + shared.bytes;
    if (std::any_of(end, end + kRedZone, [](char byte) { return byte != kRed; }))
      fail("a thread writes past the end of a shared array of ", shared.bytes, " bytes");
  }
}

void run_block(unsigned threads, std::mt19937_64& random) {
  // An error leaves fibers unfinished: their stacks can be used again, and what they held is lost.
  for (Fiber& fiber : block.fibers)
    if (fiber.stack != nullptr) block.stacks.push_back(fiber.stack);
  block.fibers.assign(threads, Fiber{});
  block.received.assign((threads + 31) / 32 * 32, 0);
  block.sites.clear();
  block.shared_used = block.shared_real = 0;
  begin_block();
  if (block.shared_rest > 0) shared_array(nullptr, block.shared_rest);
  std::vector<unsigned> turn(threads);
  for (unsigned i = 0; i < threads; ++i) {
    turn[i] = order_of_threads == 1 ? threads - 1 - i : i;
    block.fibers[i].index = {i, 0, 0};
    block.fibers[i].lane = static_cast<int>(i % 32);
  }
  for (size_t done = 0; done < threads;) {
    if (order_of_threads >= 2) std::shuffle(turn.begin(), turn.end(), random);
    bool progress = false;
    for (const unsigned i : turn) {
      if (block.fibers[i].state != State::Ready) continue;
      resume(block.fibers[i]);
      progress = true;
      done += block.fibers[i].state == State::Done;
    }
    size_t waiting = 0;
    for (const Fiber& fiber : block.fibers) waiting += fiber.state == State::AtBlock;
    if (waiting == threads) {
      for (Fiber& fiber : block.fibers) fiber.state = State::Ready;
      begin_step();
      continue;
    }
    for (unsigned warp = 0; warp * 32 < threads; ++warp) progress |= release_warp(warp);
    if (!progress) {
      for (const Fiber& fiber : block.fibers)
        if (fiber.state == State::AtWarp)
          fail("thread ", fiber.index.x, " waits in ", fiber.at, " for lanes that never come");
      fail(waiting, " of ", threads, " threads wait at a barrier that the others never reach");
    }
  }
  check_red_zones();
}

// ---- memory --------------------------------------------------------------------------------------------------

struct Range {
  uintptr_t begin, end;
  bool writable;
};
thread_local std::vector<Range> allowed;  // of the op that this host thread is in
const std::vector<Range>* touched = nullptr;

}  // namespace

void set_order(int64_t order) { order_of_threads = order; }
void set_capturing(bool on) { capturing = on; }
int64_t launches() { return launched; }

void set_most_shared(int64_t bytes) { most_shared = bytes == 0 ? int64_t{kMostRest} : bytes; }

void launch(unsigned blocks, unsigned threads, size_t shared_rest, const std::function<void()>& kernel) {
  if (blocks == 0 || threads == 0 || threads > kMostThreads) fail("a launch of ", blocks, " x ", threads, " threads");
  if (shared_rest > static_cast<size_t>(most_shared)) fail("a launch with ", shared_rest, " bytes of shared memory");
  const std::lock_guard<std::mutex> lock(running);
  std::sort(allowed.begin(), allowed.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  touched = &allowed;
  ++launched;
  begin_launch();
  block.kernel = &kernel;
  block.shared_rest = shared_rest;
  grid.block_size = {threads};
  grid.grid_size = {blocks};
  std::mt19937_64 random(static_cast<uint64_t>(order_of_threads));
  std::vector<unsigned> turn(blocks);
  for (unsigned i = 0; i < blocks; ++i) turn[i] = order_of_threads == 1 ? blocks - 1 - i : i;
  if (order_of_threads >= 2) std::shuffle(turn.begin(), turn.end(), random);
  for (const unsigned i : turn) {
    grid.block = {i, 0, 0};
    run_block(threads, random);
  }
}

void* shared_bytes(const void* site, size_t bytes) {
  for (const Shared& shared : block.sites)
    if (shared.site == site) return block.shared + shared.offset;
  block.shared_real += (bytes + 127) / 128 * 128;
  if (block.shared_real > kMostShared) fail("a block uses more than ", kMostShared, " bytes of shared memory");
  return shared_array(site, bytes);
}

void* shared_rest() { return block.shared; }

void allow(const void* memory, int64_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  if (bytes > 0) allowed.push_back({begin, begin + static_cast<uintptr_t>(bytes), writable});
}
void forget() { allowed.clear(); }

static bool is_shared(const void* p, size_t bytes) {
  const char* const at = static_cast<const char*>(p);
  return at >= block.shared && at + bytes <= block.shared + block.shared_used;
}

// Whether any range that holds these bytes is as wanted.
template <typename F>
static bool any_range(const void* p, size_t bytes, const F& wanted) {
  const auto begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  // Usually the last range that begins before the access holds it, unless read-only arguments share memory.
  auto range = std::upper_bound(touched->begin(), touched->end(), begin,
                                [](uintptr_t x, const Range& r) { return x < r.begin; });
  while (range != touched->begin()) {
    --range;
    if (begin >= range->begin && end <= range->end && wanted(*range)) return true;
  }
  return false;
}

void check_access(const void* p, size_t bytes, bool writes) {
  const char* what = writes ? "writes " : "reads ";
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail("a thread ", what, bytes, " bytes at an address that is not aligned to them");
  if (is_shared(p, bytes)) return;
  if (any_range(p, bytes, [=](const Range& range) { return !writes || range.writable; })) return;
  if (any_range(p, bytes, [](const Range&) { return true; }))
    fail("a thread writes ", bytes, " bytes of a tensor that the op only reads");
  fail("a thread ", what, bytes, " bytes outside the tensors of the call");
}

Memory memory_of(const void* p, size_t bytes) {
  const char *const stack = static_cast<Fiber*>(grid.current)->stack, *const at = static_cast<const char*>(p);
  if (at >= stack && at < stack + kStack) return Memory::Own;
  if (is_shared(p, bytes)) return Memory::Shared;
  return any_range(p, bytes, [](const Range&) { return true; }) ? Memory::Global : Memory::Own;
}

void fail_later(const std::string& text) {
  if (!block.error) block.error = std::make_exception_ptr(std::runtime_error("emulated CUDA: " + text));
}

void wait_for_block() { leave(State::AtBlock); }

void wait_for_warp(const char* what, uint32_t mask) {
  auto* me = static_cast<Fiber*>(grid.current);
  if (!(mask >> me->lane & 1))
    fail("lane ", me->lane, " calls ", what, " with mask 0x", std::hex, mask, ", without it");
  me->at = what;
  me->mask = mask;
  leave(State::AtWarp);
}

}  // namespace shira::emul
