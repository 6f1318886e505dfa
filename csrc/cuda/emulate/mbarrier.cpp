// mbarriers: arrivals, expected bytes, phases; and the order they establish between warps.
#include <cstring>

#include "cuda/emulate/async.h"

namespace emu {

static void join(Clock& into, int warp) {
  Async& a = async();
  for (int w = 0; w < B->nw; ++w) into.warps[w] = std::max(into.warps[w], B->warps[warp].vc[w]);
  for (int i = 0; i < kMaxBarriers; ++i) into.phases[i] = std::max(into.phases[i], a.seen[warp][i]);
  B->warps[warp].vc[warp]++;
}
static void acquire(const Clock& from, int warp) {
  Async& a = async();
  for (int w = 0; w < B->nw; ++w)
    B->warps[warp].vc[w] = std::max(B->warps[warp].vc[w], from.warps[w]);
  for (int i = 0; i < kMaxBarriers; ++i)
    a.seen[warp][i] = std::max(a.seen[warp][i], from.phases[i]);
  B->warps[warp].vc[warp]++;
}

static int find(uint32_t address, const char* who) {
  Async& a = async();
  for (size_t i = 0; i < a.barriers.size(); ++i)
    if (a.barriers[i].address == address) return int(i);
  fail("%s: no mbarrier at shared address %u", who, address);
}

// Completes the phase if nothing is left of it, and wakes who waits.
static void complete(int index) {
  MBarrier& b = async().barriers[index];
  if (b.arrivals_left || b.bytes_left) return;
  b.phase++;
  b.arrivals_left = b.arrivals;
  b.collecting.phases[index] = b.phase;
  b.released = b.collecting;
  b.collecting = {};
  for (int id : b.waiting) B->warps[id / 32].runnable |= 1u << id % 32;
  b.waiting.clear();
}

void mbarrier_init(uint32_t address, uint32_t arrivals, int line) {
  F->line = line;
  Async& a = async();
  if (address % 8) fail("mbarrier.init: address %u is not a multiple of 8", address);
  const int64_t at = shared_offset(address, 8, "mbarrier.init");
  if (!arrivals || arrivals >= 1u << 20) fail("mbarrier.init: %u arrivals", arrivals);
  for (const MBarrier& b : a.barriers)
    if (b.address == address) fail("mbarrier.init: there is one at shared address %u", address);
  if (a.barriers.size() == kMaxBarriers) fail("mbarrier.init: more than %d barriers", kMaxBarriers);
  touch(at, 8, true, F->id);
  MBarrier b{};
  b.address = address;
  b.arrivals = arrivals;
  b.arrivals_left = arrivals;
  b.creator = F->id;
  a.barriers.push_back(b);
}
void mbarrier_init_fence() {
  for (MBarrier& b : async().barriers)
    if (b.creator == F->id) b.seen_by_tma = true;
}

// The barrier word must be visible to this thread: like a plain read of what init wrote.
static int use(uint32_t address, const char* who, int line) {
  F->line = line;
  const int index = find(address, who);
  touch(shared_offset(address, 8, who), 8, false, F->id);
  return index;
}

void mbarrier_arrive(uint32_t address, uint32_t bytes, int line) {
  const int index = use(address, "mbarrier.arrive", line);
  MBarrier& b = async().barriers[index];
  if (bytes >= 1u << 20) fail("mbarrier.expect_tx: %u bytes are too many", bytes);
  if (!b.arrivals_left) fail("mbarrier.arrive: more than %u arrivals in a phase", b.arrivals);
  b.bytes_left += bytes;
  join(b.collecting, F->id / 32);
  b.arrivals_left--;
  complete(index);
}

void mbarrier_wait(uint32_t address, uint32_t parity, int line) {
  const int index = use(address, "mbarrier.try_wait", line);
  if (parity > 1) fail("mbarrier.try_wait: parity %u", parity);
  while ((async().barriers[index].phase & 1) == parity) {
    block_until_released("mbarrier.try_wait", line);
    F->exec = nullptr;
    F->mask = ~0u;
    async().barriers[index].waiting.push_back(F->id);
    resched();
  }
  acquire(async().barriers[index].released, F->id / 32);
}

// A copy's bytes, against the phase that is running now.
void count_bytes(int index, int64_t bytes) {
  MBarrier& b = async().barriers[index];
  b.bytes_left -= bytes;
  if (b.bytes_left <= -(int64_t(1) << 20))
    fail("mbarrier at %u: more bytes than it can count", b.address);
  complete(index);
}

// TMA's own use of a barrier.
int barrier_of_copy(uint32_t address) {
  const int index = use(address, "TMA", F->line);
  if (!async().barriers[index].seen_by_tma)
    fail("TMA: its mbarrier was initialised without fence.mbarrier_init");
  return index;
}

// ---- named barriers, with what the warps have seen of mbarriers ----
void group_barrier(int id, int threads, int line) {
  Async& a = async();
  const int warp = F->id / 32;
  if (id < 1 || id > 15 || threads % 32) fail("bar.sync: barrier %d, %d threads", id, threads);
  for (int i = 0; i < kMaxBarriers; ++i) a.pools[id][i] = std::max(a.pools[id][i], a.seen[warp][i]);
  barrier(id, threads, line);
  for (int i = 0; i < kMaxBarriers; ++i)
    a.seen[warp][i] = std::max(a.seen[warp][i], a.pools[id][i]);
}
bool group_any(int id, int threads, bool value, int line) {
  Async& a = async();
  if (id < 1 || id > 15) fail("bar.red: barrier %d", id);
  // Three slots in turn: who votes for round n + 2 has passed n + 1, so all have passed n.
  const int round = a.votes_cast[F->id][id]++;
  a.votes[id][round % 3] |= value;
  group_barrier(id, threads, line);
  a.votes[id][(round + 2) % 3] = 0;
  return a.votes[id][round % 3];
}

}  // namespace emu
