// The emulator's own state, shared by its files; kernels do not see it.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "cuda/emulate/emulate.h"

namespace emu {

constexpr size_t kStack = 64 << 10, kRed = 16 << 10;
constexpr uint32_t kBase = 0x400;  // shared-window address of a block's first byte

// Vector clocks. A warp's clock rises at every synchronisation; `clock[block * 32 + warp]` is how
// much of each warp's past is ordered before. Within a block barriers pass it on; between blocks a
// fence freezes it, an atomic leaves it at a word, and whoever reads the word may use it after a
// fence of its own.
using Knowledge = std::vector<uint32_t>;
void join(Knowledge& into, const Knowledge& from);

struct Block;
struct Fiber {
  void* sp;
  uint3 tid;
  int id, line;
  const char* op;  // what it waits for; null: nothing
  Exec exec;       // the collective, if it is one
  void* arg;
  uint32_t mask;  // the collective's lanes, or the barrier
  uint32_t cluster_arrivals, cluster_waits;
  Block* block;
};
constexpr uint32_t kClusterWait = 16;  // in the place of a barrier's number
struct Warp {
  uint32_t runnable, waiting, live;  // lanes
  uint32_t vc[32];                   // this block's warps
  Knowledge others, fenced, found;   // other blocks'; frozen by a fence; found at atomics
};
struct Barrier {
  int arrived, line;
  uint32_t warps;
};
struct Cell {  // shadow of two bytes of shared memory
  bool written;
  uint16_t writer;
  uint32_t clock;
  bool in_flight;  // cp.async will write it
};
struct Cluster {       // of Options::cluster blocks
  uint32_t phase = 0;  // completed barriers
  int arrived = 0;     // threads, in this phase
  int gone = 0;        // that have ended
  int leaving = 0;     // that have arrived in this phase and ended since
  Knowledge collecting, released;
};
struct Reader {
  uint32_t clock;
  uint8_t lane;  // 32: several
};
// An array of zeros that costs only what is touched of it.
template <typename T>
class Zeros {
 public:
  explicit Zeros(size_t count);
  ~Zeros();
  Zeros(const Zeros&) = delete;
  void clear();
  T& operator[](size_t i) { return at_[i]; }

 private:
  T* at_;
  size_t bytes_;
};
struct Async;       // async.h
struct CopyQueues;  // mma.cpp

struct Block {
  Options opt;
  const std::function<void()>* body;
  int index, nt, nw;
  size_t smem, bytes;
  Zeros<char> stacks;
  std::vector<Fiber> fibers;
  Warp warps[32];
  Barrier bars[16];
  std::vector<unsigned char> mem;
  Zeros<Cell> cells;
  Zeros<Reader> readers;  // [cell][warp]
  // By cell: the barrier of the cluster behind which the block may write it, since others have read
  // it; 0 for any.
  std::vector<uint32_t> lent;
  std::shared_ptr<Async> async;
  std::shared_ptr<CopyQueues> copies;
  bool running = false;
  uint3 at;
  Stats st{};

  Block(const Options& options, const std::function<void()>* kernel, int threads,
        size_t shared_bytes);
  unsigned char* base() {
    return reinterpret_cast<unsigned char*>((uintptr_t(mem.data()) + kRed + 1023) &
                                            ~uintptr_t(1023));
  }
};
extern __thread Block* B;  // of the running fiber
extern __thread Fiber* F;

[[noreturn]] void fail(const char* format, ...);

// ---- fibers.cpp ----
uint32_t random_bits();  // 16, from the launch's seed
void block_until_released(const char* op, int line);
void resched();      // the running fiber cannot go on
void yield_block();  // it could, but lets another block go first
Cluster& cluster_of(const Block& block);
void wake_cluster(int number);     // who waits for its barrier
Block* resident_block(int index);  // null where it has ended or not begun
// ---- cluster.cpp ----
void cluster_thread_ends();
// ---- shared.cpp ----
void touch(int64_t offset, int bytes, bool write, int fiber);
void landed(int64_t offset, int bytes, int fiber);  // written by TMA: async.h keeps its order
// ---- global.cpp ----
void global(const void* p, int bytes, bool write);
bool in_arena(const void* p);
int dev_flags(const void* p);
void launch_begins();  // what was stored before is known to all
// ---- async.cpp, tma.cpp: what fibers and hooks tell them ----
void plain_access(int64_t offset, int bytes, bool write);
bool dependency_waited();
void block_ends();
void copies_end();
bool idle();  // nothing can run: lets a copy land, if there is one
void poll();  // at every switch: a copy may land
// ---- matrix formats ----
const float* half_table();

}  // namespace emu
