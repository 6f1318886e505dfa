// What sm_90a adds to a block under emulation: mbarriers, copies of TMA, products of wgmma. Shared
// by their .cpp files; kernels do not see it.
//
// Shared memory that TMA writes and wgmma reads is shadowed in chunks of 16 bytes, beside the
// core's shadow of plain accesses. A chunk is in one of three states:
//   kPlain    written by plain stores, or not at all
//   kFlight   TMA has been asked to write it; holds NaN until the copy lands
//   kLanded   written by TMA, counted by phase `phase` of mbarrier `barrier`
// and a warp may touch a landed chunk only once it has seen that phase complete. How many phases of
// which barrier a warp has seen travels with the core's vector clocks, through mbarriers and named
// barriers.
//
// Reported, besides what the core reports:
//   a chunk touched while a copy to it is in flight, or landed but by a warp that did not wait;
//   TMA or a store into what a wgmma may still be reading, or into what another warp has read
//   without having said so; wgmma reading plain stores that no fence.proxy.async and barrier order;
//   accumulators touched between wgmma and its wait (they hold a marked NaN) or used without
//   wgmma.fence; warps of a warpgroup that issue different wgmmas; mbarriers used before they are
//   visible, with too many arrivals or bytes left over; tensor maps, coordinates, offsets,
//   alignments and descriptors outside what the documents allow; TMA of a dependent tensor before
//   griddepcontrol.wait; anything still in flight when a block ends.
//
// Copies land late (when nothing else can run), oldest or newest first, or at random, as
// Options::order says.
#pragma once

#include <array>
#include <map>
#include <vector>

#include "cuda/emulate/core.h"

namespace emu {

constexpr int kMaxBarriers = 64;
using Phases = std::array<uint32_t, kMaxBarriers>;  // completed phases seen, by barrier

struct Clock {  // of a warp, or what a barrier has collected
  uint32_t warps[32] = {};
  Phases phases = {};
};

struct MBarrier {
  uint32_t address, arrivals;  // arrivals that a phase needs
  int64_t arrivals_left, bytes_left = 0;
  uint32_t phase = 0;  // completed
  int creator;         // fiber
  bool seen_by_tma = false;
  Clock collecting, released;
  std::vector<int> waiting;  // fibers
};

enum ChunkState : uint8_t { kPlain, kInFlight, kLanded };
struct Chunk {
  ChunkState state = kPlain;
  uint8_t barrier = 0;
  uint16_t being_read = 0;     // by wgmmas and stores of TMA that have not been waited for
  uint32_t phase = 0;          // kLanded: seen when the warp has seen more than this many
  int writer = -1;             // kPlain: fiber that stored last
  uint32_t writer_fences = 0;  // proxy fences it had executed then
};

struct Copy {
  uint32_t to, barrier;  // shared window; index
  int swizzle, issuer;
  std::vector<unsigned char> data;
};

struct BulkStore {
  int issuer;  // fiber
  bool committed;
  std::vector<std::pair<int64_t, void*>> chunks;  // offset in shared memory, place in global memory
};

struct Products {  // accumulators of one warp in flight
  float* d[32];
  int n, last_group;
  std::vector<float> value;  // 16 x n
};
struct Use {
  int group;
  uint64_t a, b;
  int n;
};
struct WarpProducts {
  int group = 0;  // open
  bool open_has = false;
  uint64_t history = 0;
  uint32_t fences = 0;
  std::vector<Products> flights;
  std::vector<Use> uses;
  std::map<float*, uint32_t> delivered;  // lane 0's registers: fences executed when they came back
};

struct Async {
  std::vector<MBarrier> barriers;
  std::vector<Chunk> chunks;
  std::vector<uint32_t> reads;  // [chunk][warp]: clock of its last finished asynchronous read
  std::vector<Copy> copies;
  std::vector<BulkStore> stores;
  std::array<Phases, 32> seen = {};           // by warp
  std::array<Phases, 16> pools = {};          // by named barrier
  std::vector<std::vector<uint32_t>> fences;  // by fiber: its warp's clock at each proxy fence
  std::vector<uint8_t> depends_waited;        // by fiber: griddepcontrol.wait
  std::array<std::array<uint8_t, 3>, 16> votes = {};
  std::vector<std::array<int, 16>> votes_cast;  // by fiber
  std::array<WarpProducts, 32> products;
  std::array<int, 32> registers = {};  // by warp; 0: as launched
};

// The running block's. Made on first use.
Async& async();
bool land_a_copy(Async& a, size_t which);

// Position of a shared-window address behind the block's first byte, checked.
int64_t shared_offset(uint32_t address, int bytes, const char* who);
// The documents' swizzle: bits 4.. of an address, exchanged by the bits 7.. of the same address.
inline uint32_t swizzled(uint32_t address, int span) {
  const uint32_t rows = span == 128 ? 7 : span == 64 ? 3 : span == 32 ? 1 : 0;
  return address ^ (((address >> 7) & rows) << 4);
}
// A read of a chunk by the running warp through wgmma; fails if it is not allowed.
void check_async_read(Async& a, int64_t chunk, int warp, const char* who);
// A write through TMA by the running fiber.
void check_async_write(Async& a, int64_t chunk, int fiber, const char* who);

}  // namespace emu
