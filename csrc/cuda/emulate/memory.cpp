// The shadow of shared and of global memory, and the hooks through which the kernel's plain loads
// and stores reach it.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "cuda/emulate/core.h"

namespace emu {

// ---- shared memory ----
static bool ordered(int me, int other_warp, bool same_thread, uint32_t clock) {
  const uint32_t seen = B->warps[me / 32].vc[other_warp];
  return same_thread || (me / 32 == other_warp ? clock < seen : clock <= seen);
}
void touch(int64_t offset, int bytes, bool write, int me) {
  const char* const what = write ? "written" : "read";
  if (offset < 0 || size_t(offset + bytes) > B->smem)
    fail("shared memory %s out of bounds: %d bytes at offset %ld of %zu", what, bytes, long(offset),
         B->smem);
  const int warp = me / 32, nw = B->nw;
  const uint32_t clock = B->warps[warp].vc[warp];
  for (int64_t c = offset / 2; c <= (offset + bytes - 1) / 2; ++c) {
    Cell& s = B->cells[c];
    if (s.in_flight && B->opt.race)
      fail("shared offset %ld %s by thread %d while a copy to it is in flight", long(offset), what,
           me);
    if (!s.written && !write && B->opt.uninit)
      fail("shared offset %ld read by thread %d before any write", long(offset), me);
    if (write && !B->lent.empty() && B->lent[c] > B->fibers[me].cluster_waits)
      fail(
          "shared offset %ld written by thread %d, and no barrier of the cluster since another "
          "block read it",
          long(offset), me);
    if (B->opt.race) {
      if (s.written && !ordered(me, s.writer / 32, s.writer == me, s.clock))
        fail("race: shared offset %ld %s by thread %d, written by thread %d, no barrier between",
             long(offset), what, me, s.writer);
      Reader* const r = &B->readers[size_t(c) * nw];
      if (write) {
        for (int i = 0; i < nw; ++i) {
          if (r[i].clock && !ordered(me, i, i == warp && r[i].lane == me % 32, r[i].clock))
            fail(
                "race: shared offset %ld written by thread %d, read by warp %d, no barrier between",
                long(offset), me, i);
          r[i] = {};
        }
      } else {
        r[warp].lane = r[warp].clock == clock && r[warp].lane != me % 32 ? 32 : me % 32;
        r[warp].clock = clock;
      }
    }
    if (write) s = {true, uint16_t(me), clock, false};
  }
}
void landed(int64_t offset, int bytes, int fiber) {
  for (int64_t c = offset / 2; c < (offset + bytes) / 2; ++c)
    B->cells[c] = {true, uint16_t(fiber), 0, false};
}
unsigned char* dyn_smem() { return B->base(); }
uint32_t smem_u32(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - B->base()) + kBase;
}

// ---- global memory ----
namespace {

struct Word {  // last plain store to four bytes
  int block = -1;
  int warp = 0;
  uint32_t clock = 0;
};
struct Buffer {
  uintptr_t begin, end;
  std::string name;
  int flags;
  std::vector<uint8_t> written;  // by two bytes
  std::vector<Word> words;
};
constexpr size_t kArena = size_t(1) << 30;
std::vector<Buffer> buffers;
std::map<const void*, Knowledge> released;  // by atomic word: what fences left there
unsigned char* arena;
size_t arena_top;

// A store of another warp must be known: within the block through barriers, else through fences.
void check_known(const Buffer& b, const Word& w, const char* what) {
  if (w.block < 0) return;
  const Warp& me = B->warps[F->id / 32];
  if (w.block == B->index && (w.warp == F->id / 32 || w.clock <= me.vc[w.warp])) return;
  const size_t i = size_t(w.block) * 32 + w.warp;
  if (i < me.others.size() && w.clock <= me.others[i]) return;
  fail("%s %s, stored by warp %d of block %d, without barrier, or fence and atomic, between",
       b.name.c_str(), what, w.warp, w.block);
}

}  // namespace

void dev_reset() {
  if (!arena)
    arena = static_cast<unsigned char*>(mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  buffers.clear();
  released.clear();
  arena_top = kRed;
}
void* dev_alloc(size_t n, const char* name, int flags) {
  if (!arena) dev_reset();
  unsigned char* const p = arena + arena_top;
  const size_t room = (n + 255) / 256 * 256;
  arena_top += room + kRed;
  if (arena_top > kArena) {
    fprintf(stderr, "emulate: the device arena is exhausted\n");
    abort();
  }
  memset(p - kRed, 0xff, room + 2 * kRed);
  buffers.push_back({uintptr_t(p), uintptr_t(p) + n, name, flags, {}, {}});
  if (flags & kWriteOnce) buffers.back().written.resize(n / 2 + 1);
  if (flags & kShared) buffers.back().words.resize(n / 4 + 1);
  return p;
}
bool in_arena(const void* p) {
  return arena && size_t(static_cast<const unsigned char*>(p) - arena) < kArena;
}
int dev_flags(const void* p) {
  for (const Buffer& b : buffers)
    if (uintptr_t(p) >= b.begin && uintptr_t(p) < b.end) return b.flags;
  return 0;
}
void launch_begins() {
  for (Buffer& b : buffers) std::fill(b.words.begin(), b.words.end(), Word{});
  released.clear();
}
void global(const void* pointer, int bytes, bool write) {
  const uintptr_t a = uintptr_t(pointer);
  const char* const what = write ? "written" : "read";
  if (a % (bytes & -bytes)) fail("misaligned: %d bytes of global memory %s", bytes, what);
  for (Buffer& b : buffers) {
    if (a < b.begin || a + bytes > b.end) continue;
    if (b.flags & kDependent && !dependency_waited())
      fail("%s %s before griddepcontrol.wait", b.name.c_str(), what);
    if (write && b.flags & kReadOnly) fail("write to read-only %s", b.name.c_str());
    if (write && b.flags & kWriteOnce)
      for (size_t i = (a - b.begin) / 2; i < (a + bytes - b.begin + 1) / 2; ++i)
        if (b.written[i]++) fail("%s: element %zu stored twice", b.name.c_str(), i);
    if (b.flags & kShared)
      for (size_t i = (a - b.begin) / 4; i < (a + bytes - b.begin + 3) / 4; ++i) {
        check_known(b, b.words[i], what);
        const int warp = F->id / 32;
        if (write) b.words[i] = {B->index, warp, B->warps[warp].vc[warp]};
      }
    return;
  }
  const Buffer* near = buffers.empty() ? nullptr : &buffers[0];
  for (const Buffer& b : buffers)
    if (b.begin <= a) near = &b;
  fail("global memory %s out of bounds: %d bytes at %s%+ld of %zu", what, bytes,
       near ? near->name.c_str() : "?", near ? long(a - near->begin) : 0,
       near ? size_t(near->end - near->begin) : 0);
}

// What this warp knows, itself included, is frozen for its next atomics; what it found at atomics
// before becomes known.
void fence() {
  Warp& w = B->warps[F->id / 32];
  join(w.others, w.found);
  w.fenced = w.others;
  const size_t mine = size_t(B->index) * 32;
  if (w.fenced.size() < mine + 32) w.fenced.resize(mine + 32);
  for (int i = 0; i < B->nw; ++i) w.fenced[mine + i] = w.vc[i];
  w.vc[F->id / 32]++;
}
unsigned atomic_add(unsigned* p, unsigned v) {
  global(p, 4, false);
  Warp& w = B->warps[F->id / 32];
  Knowledge& there = released[p];
  join(w.found, there);
  join(there, w.fenced);
  const unsigned old = *p;
  *p = old + v;
  yield_block();  // the other blocks may overtake
  return old;
}

const float* half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; ++i) {
      __half_raw h;
      h.x = uint16_t(i);
      t[i] = __half2float(__half(h));
    }
    return t;
  }();
  return table.data();
}

// ---- hooks ----
static void seen(const void* p, int bytes, bool write) {
  if (!B) return;
  const int64_t offset = static_cast<const unsigned char*>(p) - B->base();
  if (offset >= -int64_t(kRed) && offset < int64_t(B->bytes + kRed)) {
    if (offset % bytes) fail("misaligned: %d bytes of shared memory", bytes);
    touch(offset, bytes, write, F->id);
    plain_access(offset, bytes, write);
  } else if (in_arena(p)) {
    global(p, bytes, write);
  }
}

}  // namespace emu

// Called by code compiled with -fsanitize=thread.
#define EMU_HOOK(n)                                                             \
  extern "C" void __tsan_read##n(void* p) { emu::seen(p, n, false); }           \
  extern "C" void __tsan_write##n(void* p) { emu::seen(p, n, true); }           \
  extern "C" void __tsan_unaligned_read##n(void* p) { emu::seen(p, n, false); } \
  extern "C" void __tsan_unaligned_write##n(void* p) { emu::seen(p, n, true); } \
  extern "C" void __tsan_volatile_read##n(void* p) { emu::seen(p, n, false); }  \
  extern "C" void __tsan_volatile_write##n(void* p) { emu::seen(p, n, true); }
EMU_HOOK(1)
EMU_HOOK(2)
EMU_HOOK(4) EMU_HOOK(8) EMU_HOOK(16) extern "C" void __tsan_read_range(void* p, size_t n) {
  for (size_t i = 0; i < n; ++i) emu::seen(static_cast<char*>(p) + i, 1, false);
}
extern "C" void __tsan_write_range(void* p, size_t n) {
  for (size_t i = 0; i < n; ++i) emu::seen(static_cast<char*>(p) + i, 1, true);
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
