// Clusters: neighbouring blocks that have a barrier together and read each other's shared memory.
//
// Reported: a read of a block that has ended or not begun, or of bytes that no barrier of the
// cluster orders behind their store; a store that none orders behind such a read; threads that
// arrive twice, or wait without having arrived.
#include <algorithm>
#include <cstring>

#include "cuda/emulate/core.h"

namespace emu {
namespace {

// What a warp knows of all blocks, its own included.
Knowledge all_of(const Warp& w) {
  Knowledge known = w.others;
  const size_t mine = size_t(B->index) * 32;
  if (known.size() < mine + 32) known.resize(mine + 32);
  for (int i = 0; i < B->nw; ++i) known[mine + i] = w.vc[i];
  return known;
}
void learn(const Knowledge& known) {
  Warp& w = B->warps[F->id / 32];
  join(w.others, known);
  const size_t mine = size_t(B->index) * 32;
  for (int i = 0; i < B->nw && mine + i < known.size(); ++i)
    w.vc[i] = std::max(w.vc[i], known[mine + i]);
}
void complete_if_all_came(Cluster& c) {
  if (!c.arrived || c.arrived + c.gone < B->opt.cluster * B->nt) return;
  c.phase++;
  c.arrived = 0;
  c.gone += c.leaving;
  c.leaving = 0;
  c.released = c.collecting;
  wake_cluster(B->index / B->opt.cluster);
}

}  // namespace

void cluster_arrive(int line) {
  Cluster& c = cluster_of(*B);
  F->line = line;
  if (F->cluster_arrivals != F->cluster_waits)
    fail("barrier.cluster.arrive twice without a wait between");
  Warp& w = B->warps[F->id / 32];
  join(c.collecting, all_of(w));
  w.vc[F->id / 32]++;
  F->cluster_arrivals++;
  c.arrived++;
  complete_if_all_came(c);
}
void cluster_wait(int line) {
  Cluster& c = cluster_of(*B);
  F->line = line;
  if (F->cluster_arrivals == F->cluster_waits) fail("barrier.cluster.wait without an arrival");
  while (c.phase < F->cluster_arrivals) {
    block_until_released("barrier.cluster", line);
    F->mask = kClusterWait;
    F->exec = nullptr;
    resched();
  }
  F->cluster_waits = F->cluster_arrivals;
  F->op = nullptr;
  learn(c.released);
}
void cluster_thread_ends() {
  if (B->opt.cluster == 1) return;
  Cluster& c = cluster_of(*B);
  (F->cluster_arrivals > c.phase ? c.leaving : c.gone)++;
  complete_if_all_came(c);
}

void load_from_block(int rank, uint32_t address, void* to, int bytes, int line) {
  F->line = line;
  if (rank < 0 || rank >= B->opt.cluster) fail("mapa: there is no block %d in the cluster", rank);
  const int64_t offset = int64_t(address) - kBase;
  if (offset < 0 || size_t(offset + bytes) > B->smem || offset % bytes)
    fail("distributed shared memory: %d bytes at offset %ld of %zu", bytes, long(offset), B->smem);
  const int index = B->index / B->opt.cluster * B->opt.cluster + rank;
  if (index == B->index) {
    touch(offset, bytes, false, F->id);
    plain_access(offset, bytes, false);
    memcpy(to, B->base() + offset, bytes);
    return;
  }
  Block* const there = resident_block(index);
  if (!there) fail("distributed shared memory of block %d, which has ended or not begun", index);
  if (there->lent.empty()) there->lent.resize(there->bytes / 2 + 1);
  const Knowledge& known = B->warps[F->id / 32].others;
  for (int64_t cell = offset / 2; cell < (offset + bytes) / 2; ++cell) {
    const Cell& s = there->cells[cell];
    const size_t writer = size_t(index) * 32 + s.writer / 32;
    if (!s.written || s.in_flight) fail("block %d's shared memory read before any write", index);
    if (writer >= known.size() || known[writer] < s.clock)
      fail("block %d's shared memory read, and no barrier of the cluster since it was written",
           index);
    there->lent[cell] = F->cluster_waits + 1;
  }
  memcpy(to, there->base() + offset, bytes);
}

}  // namespace emu
