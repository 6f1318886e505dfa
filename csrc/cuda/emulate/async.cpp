// The state that async.h describes: made when a block first uses it, looked at when it ends, and
// the checks of plain accesses to memory that TMA and wgmma use.
#include "cuda/emulate/async.h"

namespace emu {

Async& async() {
  if (!B->async) {
    auto a = std::make_shared<Async>();
    a->chunks.resize(B->bytes / 16 + 1);
    a->reads.resize(a->chunks.size() * B->nw);
    a->fences.resize(B->nt);
    a->depends_waited.resize(B->nt);
    a->votes_cast.resize(B->nt);
    B->async = a;
  }
  return *B->async;
}

int64_t shared_offset(uint32_t address, int bytes, const char* who) {
  const int64_t at = int64_t(address) - kBase;
  if (at < 0 || at + bytes > int64_t(B->smem))
    fail("%s: %d bytes of shared memory out of bounds at offset %ld of %zu", who, bytes, long(at),
         B->smem);
  return at;
}

static void check_landed(Async& a, const Chunk& c, int64_t chunk, int warp, const char* who) {
  if (c.state == kInFlight)
    fail("%s: shared offset %ld while a copy of TMA to it is in flight", who, long(chunk * 16));
  if (c.state == kLanded && a.seen[warp][c.barrier] <= c.phase)
    fail("%s: shared offset %ld by warp %d, which did not wait for the copy of TMA to it", who,
         long(chunk * 16), warp);
}
static void check_free(Async& a, const Chunk& c, int64_t chunk, int warp, const char* who) {
  if (c.being_read)
    fail("%s: shared offset %ld written while a wgmma or a store of TMA may read it", who,
         long(chunk * 16));
  for (int w = 0; w < B->nw; ++w)
    if (w != warp && a.reads[chunk * B->nw + w] > B->warps[warp].vc[w])
      fail(
          "%s: shared offset %ld written, but warp %d's wgmma or store read it and nothing says "
          "that "
          "it has ended",
          who, long(chunk * 16), w);
}

void check_async_read(Async& a, int64_t chunk, int warp, const char* who) {
  const Chunk& c = a.chunks[chunk];
  check_landed(a, c, chunk, warp, who);
  if (c.state != kPlain) return;
  touch(chunk * 16, 16, false, F->id);  // initialised, ordered
  const auto& fences = a.fences[c.writer];
  if (fences.size() <= c.writer_fences ||
      (c.writer / 32 != warp && fences[c.writer_fences] > B->warps[warp].vc[c.writer / 32]))
    fail(
        "%s: shared offset %ld was stored by thread %d without fence.proxy.async before the "
        "barrier",
        who, long(chunk * 16), c.writer);
}

void check_async_write(Async& a, int64_t chunk, int fiber, const char* who) {
  const Chunk& c = a.chunks[chunk];
  if (c.state == kInFlight)
    fail("%s: shared offset %ld has a copy in flight already", who, long(chunk * 16));
  check_free(a, c, chunk, fiber / 32, who);
  check_landed(a, c, chunk, fiber / 32, who);
}

// Called by the core for every plain access of the kernel to dynamic shared memory.
void plain_access(int64_t offset, int bytes, bool write) {
  if (!B->opt.async) return;
  Async& a = async();
  for (const MBarrier& b : a.barriers)
    if (offset < int64_t(b.address - kBase) + 8 && offset + bytes > int64_t(b.address - kBase))
      fail("plain %s of an mbarrier", write ? "write" : "read");
  for (int64_t chunk = offset / 16; chunk <= (offset + bytes - 1) / 16; ++chunk) {
    Chunk& c = a.chunks[chunk];
    check_landed(a, c, chunk, F->id / 32, write ? "store" : "load");
    if (!write) continue;
    check_free(a, c, chunk, F->id / 32, "store");
    c.state = kPlain;
    c.writer = F->id;
    c.writer_fences = uint32_t(a.fences[F->id].size());
  }
}

void async_proxy_fence() { async().fences[F->id].push_back(B->warps[F->id / 32].vc[F->id / 32]); }
void grid_dependency_wait() { async().depends_waited[F->id] = 1; }
bool dependency_waited() { return B->async && B->async->depends_waited[F->id]; }

bool idle() {
  if (!B->async || B->async->copies.empty()) return false;
  const size_t n = B->async->copies.size();
  return land_a_copy(*B->async, B->opt.order == 0   ? 0
                                : B->opt.order == 1 ? n - 1
                                                    : random_bits() % n);
}
void poll() {
  if (B->opt.order == 2 && random_bits() % 8 == 0) idle();
}

// setmaxnreg: whole warpgroups, in steps of 8; the sum is looked at when the block ends, since an
// increase waits until the registers are there.
struct Registers {
  int count;
  bool more;
};
static void registers_exec(void* const* args, uint32_t mask) {
  const auto& r = *static_cast<Registers*>(args[__builtin_ctz(mask)]);
  if (mask != ~0u) fail("setmaxnreg: the warp has fewer than 32 lanes");
  if (r.count % 8 || r.count < 24 || r.count > 256) fail("setmaxnreg: %d registers", r.count);
  const int launched = 65536 / B->nt / 8 * 8, warp = F->id / 32;
  const int now = async().registers[warp] ? async().registers[warp] : std::min(launched, 255);
  if (r.more ? r.count < now : r.count > now)
    fail("setmaxnreg.%s from %d to %d", r.more ? "inc" : "dec", now, r.count);
  async().registers[warp] = r.count;
}
void set_registers(int count, bool more, int line) {
  Registers r{count, more};
  collective(registers_exec, "setmaxnreg", ~0u, &r, line);
}

// Called by the core when all of a block's threads have ended.
void block_ends() {
  if (!B->async) return;
  Async& a = *B->async;
  if (!a.copies.empty())
    fail("the block ends while %zu copies of TMA are in flight", a.copies.size());
  if (!a.stores.empty()) fail("the block ends while stores of TMA are in flight");
  for (const MBarrier& b : a.barriers)
    if (b.bytes_left)
      fail("the block ends with %ld bytes left at the mbarrier at shared address %u",
           long(b.bytes_left), b.address);
  int registers = 0;
  for (int w = 0; w < B->nw; ++w) {
    if (a.products[w].open_has || !a.products[w].flights.empty())
      fail("the block ends while wgmmas of warp %d are in flight", w);
    if (a.products[w].history != a.products[w / 4 * 4].history)
      fail("warps %d and %d of a warpgroup issued different wgmmas", w / 4 * 4, w);
    const int launched = std::min(65536 / B->nt / 8 * 8, 255);
    registers += 32 * (a.registers[w] ? a.registers[w] : launched);
    if (a.registers[w] != a.registers[w / 4 * 4])
      fail("setmaxnreg in warp %d and not in all of its warpgroup", w);
  }
  if (registers > 65536) fail("setmaxnreg asks for %d registers of 65536", registers);
}

}  // namespace emu
