// wgmma, warp by warp: each computes its 16 of the 64 rows. Products are computed when they are
// issued and reach the registers at the wait that covers them; until then the registers hold a
// marked NaN, and the shared memory counts as being read.
#include <cstring>

#include "cuda/emulate/async.h"

namespace emu {

constexpr uint32_t kMark = 0x7fc0a5a5;

struct Issue {
  Mma kind;
  int n;
  float* d;
  uint64_t a, b;
  bool keep;
};

// A decoded matrix descriptor, K-major. With swizzle a row's 32 bytes lie in `span` bytes, without
// (span 16) its halves lie `leading` bytes apart and eight rows of a half side by side.
struct Operand {
  uint32_t start, leading, group_bytes;
  int span;
};
static Operand decode(uint64_t d, char which) {
  const int layout = int(d >> 62);
  if (d >> 49 & 7) fail("wgmma: operand %c has a base offset", which);
  if (d & 0x1FFE'0000'0000'C000ull & ~(0x3FFFull << 32) & ~(7ull << 49))
    fail("wgmma: reserved bits set in the descriptor of %c", which);
  return {uint32_t(d & 0x3FFF) << 4, uint32_t(d >> 16 & 0x3FFF) << 4,
          uint32_t(d >> 32 & 0x3FFF) << 4, layout == 0 ? 16 : 256 >> layout};
}
// The two chunks of 16 bytes of one row's 16 elements.
static uint32_t chunk_address(const Operand& o, int row, int half) {
  const uint32_t next = o.span == 16 ? o.leading : 16;
  return swizzled(o.start + row / 8 * o.group_bytes + row % 8 * o.span + half * next, o.span);
}
template <typename Each>
static void each_chunk(uint64_t a, uint64_t b, int n, int warp, Each each) {
  const Operand left = decode(a, 'A'), right = decode(b, 'B');
  for (int half = 0; half < 2; ++half) {
    for (int r = 0; r < 16; ++r) each(chunk_address(left, warp % 4 * 16 + r, half));
    for (int r = 0; r < n; ++r) each(chunk_address(right, r, half));
  }
}

static void read_row(float* out, int stride, const Operand& o, int row, Mma kind) {
  for (int half = 0; half < 2; ++half) {
    uint16_t bits[8];
    memcpy(bits, B->base() + (chunk_address(o, row, half) - kBase), 16);
    for (int i = 0; i < 8; ++i) {
      float f;
      if (kind == kF16) {
        f = half_table()[bits[i]];
      } else {
        const uint32_t word = uint32_t(bits[i]) << 16;
        memcpy(&f, &word, 4);
      }
      out[(8 * half + i) * stride] = f;
    }
  }
}

static int row_of(int lane, int r) { return lane / 4 + 8 * (r >> 1 & 1); }
static int column_of(int lane, int r) { return r / 4 * 8 + lane % 4 * 2 + (r & 1); }

static void issue_exec(void* const* args, uint32_t mask) {
  if (mask != ~0u) fail("wgmma: the warp has fewer than 32 lanes");
  Async& a = async();
  const int warp = F->id / 32;
  if (B->nw % 4) fail("wgmma: the block's last warpgroup is incomplete");
  const Issue& first = *static_cast<Issue*>(args[0]);
  for (int l = 1; l < 32; ++l) {
    const Issue& i = *static_cast<Issue*>(args[l]);
    if (i.a != first.a || i.b != first.b || i.keep != first.keep || i.n != first.n)
      fail("wgmma: lanes 0 and %d differ in their descriptors", l);
  }
  WarpProducts& w = a.products[warp];
  each_chunk(first.a, first.b, first.n, warp, [&](uint32_t address) {
    const int64_t chunk = shared_offset(address, 16, "wgmma") / 16;
    check_async_read(a, chunk, warp, "wgmma");
    a.chunks[chunk].being_read++;
  });
  w.uses.push_back({w.group, first.a, first.b, first.n});
  w.open_has = true;
  for (uint64_t v : {first.a, first.b, uint64_t(first.n) * 2 + first.keep})
    w.history = (w.history ^ v) * 0x9E3779B97F4A7C15ull;

  Products* p = nullptr;
  for (Products& f : w.flights)
    if (f.d[0] == first.d) p = &f;
  if (!p) {
    if (!w.fences) fail("wgmma: no wgmma.fence before the first");
    const auto back = w.delivered.find(first.d);
    if (back != w.delivered.end() && back->second == w.fences)
      fail("wgmma: accumulators that were free to be touched, without wgmma.fence");
    Products fresh{};
    fresh.n = first.n;
    fresh.value.resize(16 * size_t(first.n));
    for (int l = 0; l < 32; ++l) {
      float* const d = fresh.d[l] = static_cast<Issue*>(args[l])->d;
      for (int r = 0; r < first.n / 2; ++r) {
        fresh.value[row_of(l, r) * first.n + column_of(l, r)] = d[r];
        memcpy(&d[r], &kMark, 4);
      }
    }
    w.flights.push_back(std::move(fresh));
    p = &w.flights.back();
  }
  if (p->n != first.n) fail("wgmma: an accumulator of another size is in flight");
  p->last_group = w.group;
  if (!first.keep) std::fill(p->value.begin(), p->value.end(), 0.f);

  const Operand left = decode(first.a, 'A'), right = decode(first.b, 'B');
  alignas(64) float rows[16][16], columns[16][256];
  for (int r = 0; r < 16; ++r) read_row(rows[r], 1, left, warp % 4 * 16 + r, first.kind);
  for (int c = 0; c < first.n; ++c) read_row(&columns[0][c], 256, right, c, first.kind);
  for (int r = 0; r < 16; ++r) {
    float* const out = &p->value[size_t(r) * first.n];
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < first.n; ++c) out[c] += rows[r][k] * columns[k][c];
  }
  B->st.mma++;
}
void wgmma(Mma kind, int n, float* d, uint64_t a, uint64_t b, bool keep, int line) {
  Issue i{kind, n, d, a, b, keep};
  collective(issue_exec, "wgmma", ~0u, &i, line);
}

static void fence_exec(void* const*, uint32_t) { async().products[F->id / 32].fences++; }
void wgmma_fence(int line) { collective(fence_exec, "wgmma.fence", ~0u, nullptr, line); }

static void commit_exec(void* const*, uint32_t) {
  WarpProducts& w = async().products[F->id / 32];
  w.group++;
  w.open_has = false;
}
void wgmma_commit(int line) { collective(commit_exec, "wgmma.commit_group", ~0u, nullptr, line); }

static void wait_exec(void* const* args, uint32_t) {
  Async& a = async();
  const int warp = F->id / 32;
  WarpProducts& w = a.products[warp];
  const int ended = w.group - *static_cast<int*>(args[0]);  // groups before this one
  for (size_t i = 0; i < w.uses.size();) {
    const Use u = w.uses[i];
    if (u.group >= ended) {
      ++i;
      continue;
    }
    each_chunk(u.a, u.b, u.n, warp, [&](uint32_t address) {
      const int64_t chunk = (int64_t(address) - kBase) / 16;
      a.chunks[chunk].being_read--;
      a.reads[chunk * B->nw + warp] = B->warps[warp].vc[warp];
    });
    w.uses.erase(w.uses.begin() + i);
  }
  for (size_t i = 0; i < w.flights.size();) {
    Products& p = w.flights[i];
    if (p.last_group >= ended) {
      ++i;
      continue;
    }
    for (int l = 0; l < 32; ++l)
      for (int r = 0; r < p.n / 2; ++r) {
        if (memcmp(&p.d[l][r], &kMark, 4))
          fail("an accumulator of lane %d was written while wgmma had it", l);
        p.d[l][r] = p.value[size_t(row_of(l, r)) * p.n + column_of(l, r)];
      }
    w.delivered[p.d[0]] = w.fences;
    w.flights.erase(w.flights.begin() + i);
  }
  B->warps[warp].vc[warp]++;
}
void wgmma_wait(int pending, int line) {
  collective(wait_exec, "wgmma.wait_group", ~0u, &pending, line);
}

// ---- the other collectives of a warp ----
struct Word {
  uint32_t in, out;
};
static void movmatrix_exec(void* const* args, uint32_t mask) {
  if (mask != ~0u) fail("movmatrix: the warp has fewer than 32 lanes");
  const auto element = [&](int row, int column) {
    return static_cast<Word*>(args[4 * row + column / 2])->in >> (column % 2 * 16) & 0xffff;
  };
  for (int l = 0; l < 32; ++l)
    static_cast<Word*>(args[l])->out = element(l % 4 * 2, l / 4) | element(l % 4 * 2 + 1, l / 4)
                                                                       << 16;
}
uint32_t movmatrix(uint32_t word, int line) {
  Word w{word, 0};
  collective(movmatrix_exec, "movmatrix", ~0u, &w, line);
  return w.out;
}
static void elect_exec(void* const* args, uint32_t mask) {
  // Any lane may be chosen: the highest in one order of the schedule, else the lowest.
  const int chosen = B->opt.order == 1 ? 31 - __builtin_clz(mask) : __builtin_ctz(mask);
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1) *static_cast<bool*>(args[l]) = l == chosen;
}
bool elect(int line) {
  bool chosen = false;
  collective(elect_exec, "elect.sync", ~0u, &chosen, line);
  return chosen;
}

}  // namespace emu
