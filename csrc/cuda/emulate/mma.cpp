// cp.async, ldmatrix and mma.sync of sm_80, to the PTX documents.
#include <algorithm>
#include <cstring>

#include "cuda/emulate/core.h"
#include "cuda/emulate/sm80.h"

namespace emu {

// ---- cp.async ----
struct Copy16 {
  int64_t to;
  int bytes, group;
  unsigned char data[16];
};
struct CopyQueue {  // of one thread
  std::vector<Copy16> flights;
  int group = 0;  // open
};
struct CopyQueues {
  std::vector<CopyQueue> of;  // by thread
};

static CopyQueue& queue() {
  if (!B->copies) {
    B->copies = std::make_shared<CopyQueues>();
    B->copies->of.resize(B->nt);
  }
  return B->copies->of[F->id];
}

void copy_async(uint32_t to, const void* from, int bytes, int source, int line) {
  F->line = line;
  const int64_t offset = int64_t(to) - kBase;
  if (offset % bytes) fail("cp.async: misaligned shared address");
  if (source < 0 || source > bytes) fail("cp.async: %d bytes of %d", source, bytes);
  if (source && uintptr_t(from) % bytes) fail("cp.async: misaligned global address");
  if (source) global(from, source, false);
  touch(offset, bytes, true, F->id);
  Copy16 copy{offset, bytes, queue().group, {}};
  memcpy(copy.data, from, source);
  queue().flights.push_back(copy);
  for (int64_t c = offset / 2; c < (offset + bytes) / 2; ++c) B->cells[c].in_flight = true;
  memset(B->base() + offset, 0xff, bytes);
}
void copies_commit() { queue().group++; }
void copies_wait(int pending) {
  CopyQueue& q = queue();
  size_t n = 0;
  for (; n < q.flights.size() && q.flights[n].group < q.group - pending; ++n) {
    const Copy16& copy = q.flights[n];
    memcpy(B->base() + copy.to, copy.data, copy.bytes);
    const int warp = F->id / 32;
    for (int64_t c = copy.to / 2; c < (copy.to + copy.bytes) / 2; ++c)
      B->cells[c] = {true, uint16_t(F->id), B->warps[warp].vc[warp], false};
  }
  q.flights.erase(q.flights.begin(), q.flights.begin() + n);
}
void copies_end() {
  if (!B->copies) return;
  for (const CopyQueue& q : B->copies->of)
    if (!q.flights.empty()) fail("the block ends while copies of cp.async are in flight");
}

// ---- ldmatrix ----
struct Matrices {
  uint32_t* r;
  uint32_t address;
};
static void ldmatrix_exec(void* const* args, uint32_t mask) {
  if (mask != ~0u) fail("ldmatrix: the warp has fewer than 32 lanes");
  const uint16_t* rows[32];
  for (int i = 0; i < 32; ++i) {
    const int64_t offset = int64_t(static_cast<Matrices*>(args[i])->address) - kBase;
    if (offset % 16) fail("ldmatrix: misaligned row address of lane %d", i);
    touch(offset, 16, false, (F->id & ~31) + i);
    rows[i] = reinterpret_cast<uint16_t*>(B->base() + offset);
  }
  for (int m = 0; m < 4; ++m) {
    int hits[8] = {};  // rows that begin in the same four banks
    for (int i = 8 * m; i < 8 * m + 8; ++i)
      if (std::find(rows + 8 * m, rows + i, rows[i]) == rows + i)
        hits[static_cast<Matrices*>(args[i])->address / 16 % 8]++;
    B->st.bank_conflicts += *std::max_element(hits, hits + 8) - 1;
    for (int l = 0; l < 32; ++l)
      memcpy(&static_cast<Matrices*>(args[l])->r[m], rows[8 * m + l / 4] + 2 * (l % 4), 4);
  }
}
void ldmatrix(uint32_t (&r)[4], uint32_t address, int line) {
  Matrices m{r, address};
  collective(ldmatrix_exec, "ldmatrix", ~0u, &m, line);
}

// ---- mma.sync ----
struct Product {
  float* d;
  const uint32_t *a, *b;
  Mma kind;
};
static float low(Mma kind, uint32_t word) {
  return kind == kF16 ? half_table()[word & 0xffff] : __uint_as_float(word << 16);
}
static float high(Mma kind, uint32_t word) {
  return kind == kF16 ? half_table()[word >> 16] : __uint_as_float(word & 0xffff0000u);
}
static void mma_exec(void* const* args, uint32_t mask) {
  if (mask != ~0u) fail("mma: the warp has fewer than 32 lanes");
  const Mma kind = static_cast<Product*>(args[0])->kind;
  const int depth = kind == kTF32 ? 8 : 16;
  alignas(64) float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; ++l) {
    const Product& p = *static_cast<Product*>(args[l]);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1), half = i >> 1;
      d[g + 8 * half][2 * t + (i & 1)] = p.d[i];
      if (kind == kTF32) {
        a[row][t + 4 * half] = __uint_as_float(p.a[i] & ~0x1fffu);
      } else {
        a[row][2 * t + 8 * half] = low(kind, p.a[i]);
        a[row][2 * t + 8 * half + 1] = high(kind, p.a[i]);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (kind == kTF32) {
        b[t + 4 * i][g] = __uint_as_float(p.b[i] & ~0x1fffu);
      } else {
        b[2 * t + 8 * i][g] = low(kind, p.b[i]);
        b[2 * t + 8 * i + 1][g] = high(kind, p.b[i]);
      }
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < depth; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i)
      static_cast<Product*>(args[l])->d[i] = d[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
  B->st.mma++;
}
void mma(Mma kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, int line) {
  Product p{d, a, b, kind};
  collective(mma_exec, "mma", ~0u, &p, line);
}

}  // namespace emu
