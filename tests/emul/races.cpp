// Finds data races of emulated kernels, in builds with SHIRA_SANITIZE=thread: the compiler then calls __tsan_* at every
// access that a kernel makes, and these are here, since only the emulator knows which fiber runs and what orders it.
//
// A race is two accesses to the same byte in one launch, by two threads, of which one writes and not both are atomic or
// volatile, unless a __syncthreads() of their block lies between them. Nothing else orders memory: the operations of a
// warp exchange registers only.
#include <memory>
#include <sstream>
#include <unordered_map>

#include "cuda_emul.h"

namespace shira::emul {
namespace {

// Who was here last in this launch.
struct Access {
  uint64_t launch = 0;  // of shared memory, which every block has anew: the block's number among those of all launches
  uint32_t block = 0, step = 0;  // the block's barriers so far
  uint32_t thread = 0;
  bool relaxed = false;  // atomic or volatile
  bool others = false;   // so was another thread of the block since its last barrier,
  bool blocks = false;   // or another block
};
struct Byte {
  Access read, written;
};

constexpr uintptr_t kPage = 1024;
std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;
uintptr_t last_page = 0;
Byte* last = nullptr;
uint64_t launch_number = 0, block_number = 0;
uint32_t step = 0;
bool watching = true;

Byte& byte_at(uintptr_t address) {
  if (last == nullptr || address / kPage != last_page) {
    last_page = address / kPage;
    auto& page = pages[last_page];
    if (page == nullptr) page.reset(new Byte[kPage]);
    last = page.get();
  }
  return last[address % kPage];
}

bool unordered(const Access& before, const Access& now) {
  if (before.launch != now.launch || (before.relaxed && now.relaxed)) return false;
  if (before.block != now.block || before.blocks) return true;
  return before.step == now.step && (before.thread != now.thread || before.others);
}

void enter(Access& own, const Access& now) {
  const bool same_launch = own.launch == now.launch, same_block = same_launch && own.block == now.block;
  const bool blocks = same_launch && (own.blocks || !same_block);
  const bool others = same_block && own.step == now.step && (own.others || own.thread != now.thread);
  const bool relaxed = now.relaxed && (!same_block || own.step != now.step || own.relaxed);
  own = now;
  own.blocks = blocks;
  own.others = others;
  own.relaxed = relaxed;
}

void access(const void* p, size_t bytes, bool writes) {
  if (grid.current == nullptr || !watching) return;
  const Memory memory = memory_of(p, bytes);
  if (memory == Memory::Own) return;
  const uint64_t launch = memory == Memory::Shared ? block_number : launch_number;
  const Access now{launch, grid.block.x, step, grid.current->index.x, grid.relaxed, false, false};
  const auto begin = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = begin; at < begin + bytes; ++at) {
    Byte& byte = byte_at(at);
    const bool behind_write = unordered(byte.written, now), behind_read = writes && unordered(byte.read, now);
    if (behind_write || behind_read) {
      const Access& before = behind_write ? byte.written : byte.read;
      std::ostringstream text;
      text << "a race: thread " << now.thread << " of block " << now.block << (writes ? " writes" : " reads")
           << " what thread " << before.thread << " of block " << before.block << (behind_write ? " writes" : " reads")
           << ", and no barrier orders them (byte " << at - begin << " of " << bytes << ")";
      fail_later(text.str());  // the compiler takes it that its own calls never throw
      return;
    }
    enter(writes ? byte.written : byte.read, now);
  }
}

}  // namespace

void watch(bool on) { watching = on; }
void begin_launch() {
  ++launch_number;
  pages.clear();
  last = nullptr;
}
void begin_block() {
  ++block_number;
  step = 0;
}
void begin_step() { ++step; }

}  // namespace shira::emul

#define SHIRA_ACCESSES(bytes)                                                          \
  void __tsan_read##bytes(void* p) { shira::emul::access(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { shira::emul::access(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { shira::emul::access(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { shira::emul::access(p, bytes, true); }
extern "C" {
SHIRA_ACCESSES(1)
SHIRA_ACCESSES(2)
SHIRA_ACCESSES(4)
SHIRA_ACCESSES(8)
SHIRA_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { shira::emul::access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { shira::emul::access(p, bytes, true); }
// Of the host's code alone.
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
int __tsan_atomic32_fetch_add(volatile int* p, int x, int) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }
}
