// Fibers, their schedule, barriers and warp collectives, and the launch of a grid.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>

#include "cuda/emulate/core.h"

#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* to);
asm(".text\n.globl emu_switch\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#else
#error "emu_switch: add the callee-saved register swap of this architecture"
#endif

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

__thread Block* B;
__thread Fiber* F;

namespace {

struct Launch {
  std::vector<std::unique_ptr<Block>> blocks;  // resident
  void* main_sp;
  std::string error;
  uint32_t seed;
  std::map<int, Cluster> clusters;
};
__thread Launch* L;

void run(Fiber* f) {
  if (f == F) return;
  void** const save = &F->sp;
  F = f;
  B = f->block;
  threadIdx = f->tid;
  blockIdx = B->at;
  B->st.switches++;
  emu_switch(save, f->sp);
}
void leave() { emu_switch(&F->sp, L->main_sp); }

void deadlock() {
  std::map<std::string, int> where;
  for (const auto& b : L->blocks)
    if (b->running)
      for (const Fiber& f : b->fibers)
        where[f.op ? std::string(f.op) + " line " + std::to_string(f.line) : "its end"]++;
  std::string text;
  for (const auto& [place, count] : where)
    text += " [" + std::to_string(count) + " threads at " + place + "]";
  fail("deadlock:%s", text.c_str());
}

// The next fiber of a block, or null.
Fiber* next_of(Block& b, int after) {
  int w = after < 0 ? 0 : after / 32;
  if (after < 0 || !b.warps[w].runnable) {
    const int start = b.opt.order == 2 ? int(random_bits()) % b.nw : 0;
    int i = 0;
    for (; i < b.nw; ++i) {
      w = b.opt.order == 1 ? b.nw - 1 - i : (i + start) % b.nw;
      if (b.warps[w].runnable) break;
    }
    if (i == b.nw) return nullptr;
  }
  const uint32_t lanes = b.warps[w].runnable;
  const uint32_t later = after < 0 ? lanes : lanes & (~0u << after % 32);
  return &b.fibers[w * 32 + __builtin_ctz(later ? later : lanes)];
}
Fiber* next_of_others() {
  const size_t n = L->blocks.size();
  size_t mine = 0;
  while (mine < n && L->blocks[mine].get() != B) ++mine;
  for (size_t i = 1; i < n; ++i) {
    Block& b = *L->blocks[(mine + i) % n];
    if (!b.running) continue;
    if (Fiber* f = next_of(b, -1)) return f;
  }
  return nullptr;
}

// Nothing can run: in each block a copy lands, if there is one.
bool land_somewhere() {
  Block* const mine = B;
  bool any = false;
  for (const auto& b : L->blocks) {
    if (!b->running) continue;
    B = b.get();
    any |= idle();
  }
  B = mine;
  return any;
}

void fiber_main() {
  (*B->body)();
  F->op = nullptr;
  cluster_thread_ends();
  Warp& w = B->warps[F->id / 32];
  w.live &= ~(1u << F->id % 32);
  w.runnable &= w.live;
  bool any = false;
  for (int i = 0; i < B->nw; ++i) any |= B->warps[i].live != 0;
  if (!any) {
    block_ends();
    copies_end();
    B->running = false;
    leave();  // another block may take its place
  }
  resched();
  __builtin_trap();
}

void start(Block& b, int index, dim3 grid, dim3 block) {
  b.index = index;
  b.at = {index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
  std::fill(b.mem.begin(), b.mem.end(), 0xff);  // NaN in every format
  b.cells.clear();
  b.lent.clear();
  b.readers.clear();
  for (Warp& w : b.warps) w = Warp{};
  memset(b.bars, 0, sizeof b.bars);
  b.async.reset();
  b.copies.reset();
  for (int i = 0; i < b.nt; ++i) {
    Fiber& f = b.fibers[i];
    f = Fiber{};
    f.id = i;
    f.op = "its start";
    f.mask = ~0u;
    f.block = &b;
    f.tid = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    void** const top = reinterpret_cast<void**>(&b.stacks[kStack * (i + 1)]) - 2;
    *top = reinterpret_cast<void*>(fiber_main);
    f.sp = top - 6;
    Warp& w = b.warps[i / 32];
    w.live |= 1u << i % 32;
    w.runnable = w.live;
    w.vc[i / 32] = 1;
  }
  b.running = true;
}

}  // namespace

template <typename T>
Zeros<T>::Zeros(size_t count) : bytes_((count * sizeof(T) + 4095) / 4096 * 4096) {
  void* const p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  at_ = static_cast<T*>(p);
}
template <typename T>
Zeros<T>::~Zeros() {
  munmap(at_, bytes_);
}
template <typename T>
void Zeros<T>::clear() {
  madvise(at_, bytes_, MADV_DONTNEED);
}

Block::Block(const Options& options, const std::function<void()>* kernel, int threads,
             size_t shared_bytes)
    : opt(options),
      body(kernel),
      nt(threads),
      nw((threads + 31) / 32),
      smem(shared_bytes),
      bytes((shared_bytes + 15) / 16 * 16),
      stacks(kStack * threads),
      fibers(threads),
      mem(bytes + 2 * kRed + 1024),
      cells(bytes / 2 + 1),
      readers((bytes / 2 + 1) * nw) {}

void join(Knowledge& into, const Knowledge& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void fail(const char* format, ...) {
  char what[600], text[800];
  va_list v;
  va_start(v, format);
  vsnprintf(what, sizeof what, format, v);
  va_end(v);
  snprintf(text, sizeof text, "block (%u,%u,%u) thread %d, at or after line %d: %s", blockIdx.x,
           blockIdx.y, blockIdx.z, F->id, F->line, what);
  if (F->id < 0) throw std::runtime_error(text);  // no fiber is running
  L->error = text;
  leave();
  __builtin_unreachable();
}

uint32_t random_bits() {
  L->seed = L->seed * 1664525u + 1013904223u;
  return L->seed >> 16;
}

void block_until_released(const char* op, int line) {
  F->op = op;
  F->line = line;
  B->warps[F->id / 32].runnable &= ~(1u << F->id % 32);
}
void resched() {
  poll();
  Fiber* f = nullptr;
  if (B->opt.order == 2 && random_bits() % 8 == 0) f = next_of_others();
  if (!f) f = next_of(*B, F->id);
  if (!f) f = next_of_others();
  while (!f) {
    if (!land_somewhere()) deadlock();
    f = next_of(*B, F->id);
    if (!f) f = next_of_others();
  }
  run(f);
}
void yield_block() {
  if (Fiber* f = next_of_others()) run(f);
}

Cluster& cluster_of(const Block& block) { return L->clusters[block.index / block.opt.cluster]; }
void wake_cluster(int number) {
  for (const auto& b : L->blocks) {
    if (!b->running || b->index / b->opt.cluster != number) continue;
    for (Fiber& f : b->fibers)
      if (f.op && !f.exec && f.mask == kClusterWait &&
          !(b->warps[f.id / 32].runnable >> f.id % 32 & 1))
        b->warps[f.id / 32].runnable |= 1u << f.id % 32;
  }
}
Block* resident_block(int index) {
  for (const auto& b : L->blocks)
    if (b->running && b->index == index) return b.get();
  return nullptr;
}

int lane() { return F->id & 31; }

void barrier(int id, int count, int line) {
  Barrier& b = B->bars[id];
  if (b.arrived && b.line != line) fail("divergent barrier %d: lines %d and %d", id, b.line, line);
  block_until_released("barrier", line);
  F->mask = id;
  F->exec = nullptr;
  b.line = line;
  b.warps |= 1u << F->id / 32;
  if (++b.arrived < (count ? count : B->nt)) return resched();
  uint32_t all[32] = {};
  Knowledge others;
  for (int w = 0; w < B->nw; ++w) {
    if (!(b.warps >> w & 1)) continue;
    for (int i = 0; i < B->nw; ++i) all[i] = std::max(all[i], B->warps[w].vc[i]);
    join(others, B->warps[w].others);
  }
  for (int w = 0; w < B->nw; ++w) {
    if (!(b.warps >> w & 1)) continue;
    memcpy(B->warps[w].vc, all, sizeof all);
    B->warps[w].vc[w]++;
    B->warps[w].others = others;
  }
  for (Fiber& f : B->fibers)
    if (f.op && !f.exec && f.mask == uint32_t(id) &&
        !(B->warps[f.id / 32].runnable >> f.id % 32 & 1))
      B->warps[f.id / 32].runnable |= 1u << f.id % 32;
  b = {};
  B->st.barriers++;
}

void collective(Exec exec, const char* op, uint32_t mask, void* arg, int line) {
  Fiber* const f = F;
  Warp& w = B->warps[f->id / 32];
  if (B->nt < (f->id | 31) + 1 && mask == ~0u) mask = (1u << B->nt % 32) - 1;
  if (!(mask >> f->id % 32 & 1)) fail("%s: caller is not in its mask", op);
  block_until_released(op, line);
  f->exec = exec;
  f->arg = arg;
  f->mask = mask;
  w.waiting |= 1u << f->id % 32;
  if ((w.waiting & mask) != mask) return resched();
  void* args[32] = {};
  Fiber* const first = &B->fibers[f->id & ~31];
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Fiber& g = first[l];
    if (g.exec != exec || g.mask != mask || g.line != line)
      fail("divergent warp: %s line %d, but lane %d at %s line %d", op, line, l, g.op, g.line);
    args[l] = g.arg;
  }
  exec(args, mask);
  w.waiting &= ~mask;
  w.runnable |= mask;
}
void none_exec(void* const*, uint32_t) { B->warps[F->id / 32].vc[F->id / 32]++; }
void shfl_exec(void* const* args, uint32_t mask) {
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    auto* const s = static_cast<Shfl*>(args[l]);
    if (!(mask >> (s->source & 31) & 1)) fail("shfl: lane %d reads inactive lane %d", l, s->source);
    s->out = static_cast<Shfl*>(args[s->source & 31])->in;
  }
}
void ballot_exec(void* const* args, uint32_t mask) {
  uint64_t votes = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) votes |= static_cast<Shfl*>(args[l])->in << l;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) static_cast<Shfl*>(args[l])->out = votes;
}

Result launch(dim3 grid, dim3 block, size_t smem, const std::function<void()>& body, Options opt) {
  const int total = int(grid.x * grid.y * grid.z);
  Launch launch{{}, nullptr, {}, opt.seed, {}};
  L = &launch;
  launch_begins();
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {block.x, block.y, block.z};
  opt.resident = std::max(opt.resident, opt.cluster);  // a cluster's blocks run together
  for (int i = 0; i < std::min(opt.resident, total); ++i) {
    launch.blocks.push_back(
        std::make_unique<Block>(opt, &body, int(block.x * block.y * block.z), smem));
  }
  int next = 0;
  Fiber nobody{};  // stands for this loop
  nobody.id = -1;
  while (launch.error.empty()) {
    for (auto& b : launch.blocks)
      if (!b->running && next < total) {
        start(*b, opt.order == 1 ? total - 1 - next : next, grid, block);
        ++next;
      }
    // Goes on with the first block that is left; it is back here when a block ends.
    B = nullptr;
    F = &nobody;
    Fiber* f = nullptr;
    for (auto& b : launch.blocks) {
      if (!b->running) continue;
      if (!B) B = b.get();
      if (!f) f = next_of(*b, -1);
    }
    if (!B) break;
    if (!f) {
      try {
        if (!land_somewhere()) launch.error = "deadlock between blocks";
      } catch (const std::exception& error) {
        launch.error = error.what();
      }
      continue;
    }
    F = f;
    B = f->block;
    threadIdx = f->tid;
    blockIdx = B->at;
    emu_switch(&launch.main_sp, f->sp);
  }
  Result result{launch.error, {}};
  for (auto& b : launch.blocks) {
    result.stats.mma += b->st.mma;
    result.stats.barriers += b->st.barriers;
    result.stats.switches += b->st.switches;
    result.stats.bank_conflicts += b->st.bank_conflicts;
  }
  B = nullptr;
  F = nullptr;
  L = nullptr;
  return result;
}

}  // namespace emu
