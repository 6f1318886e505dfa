// The emulated primitives against their definitions, and each detector on a kernel of a few lines.
// Prints what went wrong; tests/test_cuda_emulator.py builds and runs it.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "cuda/emulate/emulate.h"
#include "cuda/emulate/sm80.h"
#include "cuda/emulate/sm90.h"

using emu::dev_alloc;
using emu::launch;
using emu::Options;
using emu::Result;

namespace {

int failures = 0;
#define CHECK(condition)                                     \
  do {                                                       \
    if (!(condition)) {                                      \
      ++failures;                                            \
      printf("line %d: not so: %s\n", __LINE__, #condition); \
    }                                                        \
  } while (0)

Result go(int threads, const std::function<void()>& body, int blocks = 1, Options options = {}) {
  return launch(dim3(blocks), dim3(threads), 4096, body, options);
}
void completes(const char* what, const Result& r) {
  if (r.error.empty()) return;
  ++failures;
  printf("%s: reports '%s'\n", what, r.error.c_str());
}
void reports(const char* sentence, const Result& r) {
  if (strstr(r.error.c_str(), sentence)) return;
  ++failures;
  printf("should report '%s', reports '%s'\n", sentence, r.error.c_str());
}
uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

template <typename T>
T* buffer(int count, const char* name, int flags) {
  return static_cast<T*>(dev_alloc(sizeof(T) * count, name, flags));
}

volatile int out[256];  // keeps loads alive

void collectives() {
  completes("shuffles", go(64, [] {
              const int t = threadIdx.x, l = t & 31;
              CHECK(__shfl_xor_sync(~0u, t, 5) == (t ^ 5));
              CHECK(__shfl_sync(~0u, t, 1, 8) == (t & ~7) + 1);
              CHECK(__ballot_sync(~0u, l % 3 == 0) == 0x49249249u);
              // Halves of a warp may do different things.
              if (l < 16) {
                CHECK(__shfl_xor_sync(0xffffu, t, 1) == (t ^ 1));
              } else {
                CHECK(__shfl_xor_sync(0xffff0000u, t, 2) == (t ^ 2));
              }
            }));
}

// Element (row, column) of matrix m is the number 64 m + 8 row + column.
void matrices() {
  completes("ldmatrix", go(32, [] {
              auto* const s = reinterpret_cast<uint16_t*>(emu::dyn_smem());
              const int l = threadIdx.x;
              for (int i = 0; i < 8; ++i) s[8 * l + i] = uint16_t(8 * l + i);
              __syncwarp();
              uint32_t r[4];
              emu::ldmatrix(r, emu::smem_u32(s + 8 * l), __LINE__);
              for (int m = 0; m < 4; ++m) {
                const uint32_t first = 64 * m + l / 4 * 8 + l % 4 * 2;
                CHECK(r[m] == (first | (first + 1) << 16));
              }
            }));
  const Result conflicts = go(32, [] {
    auto* const s = reinterpret_cast<uint16_t*>(emu::dyn_smem());
    for (int i = threadIdx.x; i < 32 * 64; i += 32) s[i] = 0;
    __syncwarp();
    uint32_t r[4];
    emu::ldmatrix(r, emu::smem_u32(s + 64 * threadIdx.x), __LINE__);  // rows of 128 bytes
  });
  completes("ldmatrix with conflicts", conflicts);
  CHECK(conflicts.stats.bank_conflicts == 4 * 7);
}

// A[i][k] = i + k, B[k][j] = k - j, C = 1, by the layouts of the PTX document.
template <typename Pack>
void products(emu::Mma kind, int depth, Pack pack) {
  static float d[16][8];
  completes("mma.sync", go(32, [=] {
              const int g = threadIdx.x / 4, t = threadIdx.x % 4;
              const auto a_at = [=](int i, int k) { return float(i + k); };
              const auto b_at = [=](int k, int j) { return float(k - j); };
              uint32_t a[4], b[2];
              for (int r = 0; r < 4; ++r) {
                const int i = g + r % 2 * 8;
                const int k = depth == 16 ? 2 * t + r / 2 * 8 : t + r / 2 * 4;
                a[r] = pack(a_at(i, k), a_at(i, k + 1));
              }
              for (int r = 0; r < 2; ++r) {
                const int k = depth == 16 ? 2 * t + r * 8 : t + r * 4;
                b[r] = pack(b_at(k, g), b_at(k + 1, g));
              }
              float c[4] = {1, 1, 1, 1};
              emu::mma(kind, c, a, b, __LINE__);
              for (int r = 0; r < 4; ++r) d[g + r / 2 * 8][2 * t + r % 2] = c[r];
            }));
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float want = 1;
      for (int k = 0; k < depth; ++k) want += float(i + k) * float(k - j);
      CHECK(d[i][j] == want);  // small integers: exact in every type
    }
}

// Operands without swizzle, by the PTX document: 8 x 16 bytes side by side, the leading offset
// between the halves of 16 elements, the stride between groups of eight rows. Those of B overlap.
void plain_operands() {
  constexpr int kLeadingA = 1040, kStrideA = 128, kLeadingB = 16, kStrideB = 128, kStartB = 2064;
  static float d[64][32];
  const auto at = [](int row, int k, int leading, int stride) {  // in bytes
    return k / 8 * leading + row / 8 * stride + row % 8 * 16 + k % 8 * 2;
  };
  const auto number = [](int at) { return float(at / 2 % 23 - 11); };  // that lies there
  const auto go_with = [&](bool fenced) {
    Options options;
    options.async = true;
    return go(
        128,
        [=] {
          auto* const s = reinterpret_cast<uint16_t*>(emu::dyn_smem());
          const int t = threadIdx.x;
          for (int i = t; i < 2048; i += 128) s[i] = uint16_t(bits_of(number(2 * i)) >> 16);
          if (fenced) emu::async_proxy_fence();
          __syncthreads();
          const auto descriptor = [&](int start, int leading, int stride) {
            return uint64_t(emu::smem_u32(s) + start) >> 4 | uint64_t(leading >> 4) << 16 |
                   uint64_t(stride >> 4) << 32;
          };
          float c[16] = {};
          emu::wgmma_fence(__LINE__);
          emu::wgmma(emu::kBF16, 32, c, descriptor(0, kLeadingA, kStrideA),
                     descriptor(kStartB, kLeadingB, kStrideB), false, __LINE__);
          emu::wgmma_commit(__LINE__);
          emu::wgmma_wait(0, __LINE__);
          for (int r = 0; r < 16; ++r)
            d[t / 32 * 16 + t % 32 / 4 + r / 2 % 2 * 8][r / 4 * 8 + t % 4 * 2 + r % 2] = c[r];
        },
        1, options);
  };
  completes("wgmma without swizzle", go_with(true));
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < 32; ++j) {
      float want = 0;
      for (int k = 0; k < 16; ++k)
        want +=
            number(at(i, k, kLeadingA, kStrideA)) * number(kStartB + at(j, k, kLeadingB, kStrideB));
      CHECK(d[i][j] == want);
    }
  reports("without fence.proxy.async", go_with(false));
}

void copies() {
  int* const from = buffer<int>(128, "from", emu::kReadOnly);
  for (int i = 0; i < 128; ++i) from[i] = i;
  completes("cp.async", go(32, [=] {
              const int t = threadIdx.x;
              int* const s = reinterpret_cast<int*>(emu::dyn_smem());
              emu::copy_async(emu::smem_u32(s + 4 * t), from + 4 * t, 16, t < 16 ? 16 : 0,
                              __LINE__);
              emu::copies_commit();
              emu::copies_wait(0);
              CHECK(s[4 * t + 3] == (t < 16 ? 4 * t + 3 : 0));  // zeros where nothing was read
              __syncwarp();
              CHECK(s[4 * (t ^ 1)] == ((t ^ 1) < 16 ? 4 * (t ^ 1) : 0));
            }));
  completes("the beginning of 16 bytes", go(32, [=] {
              const int t = threadIdx.x;
              int* const s = reinterpret_cast<int*>(emu::dyn_smem());
              emu::copy_async(emu::smem_u32(s + 4 * t), from + 124, 16, 12, __LINE__);
              emu::copies_commit();
              emu::copies_wait(0);
              CHECK(s[4 * t + 2] == 126 && s[4 * t + 3] == 0);
            }));
  reports("in flight", go(32, [=] {
            int* const s = reinterpret_cast<int*>(emu::dyn_smem());
            emu::copy_async(emu::smem_u32(s + 4 * threadIdx.x), from, 16, 16, __LINE__);
            emu::copies_commit();
            emu::copies_wait(1);
            out[threadIdx.x] = s[4 * threadIdx.x];
          }));
  reports("race", go(32, [=] {  // landed for the thread that waited, and for no other
            int* const s = reinterpret_cast<int*>(emu::dyn_smem());
            emu::copy_async(emu::smem_u32(s + 4 * threadIdx.x), from, 16, 16, __LINE__);
            emu::copies_commit();
            emu::copies_wait(0);
            if (threadIdx.x & 1) out[threadIdx.x] = s[4 * (threadIdx.x - 1)];
          }));
  reports("out of bounds", go(32, [=] {
            emu::copy_async(emu::smem_u32(emu::dyn_smem()) + 16 * threadIdx.x, from + 124 + 4, 16,
                            16, __LINE__);
          }));
  reports("misaligned", go(32, [=] {
            emu::copy_async(emu::smem_u32(emu::dyn_smem()) + 16 * threadIdx.x + 8, from, 16, true,
                            __LINE__);
          }));
  reports("the block ends while copies",
          go(1, [=] { emu::copy_async(emu::smem_u32(emu::dyn_smem()), from, 16, 16, __LINE__); }));
}

void shared_memory() {
  reports("before any write", go(32, [] { out[threadIdx.x] = emu::dyn_smem()[threadIdx.x]; }));
  reports("out of bounds",
          go(32, [] { reinterpret_cast<uint16_t*>(emu::dyn_smem())[2040 + threadIdx.x] = 1; }));
  reports("misaligned", go(32, [] {
            *reinterpret_cast<volatile int*>(emu::dyn_smem() + 4 * threadIdx.x + 2) = 1;
          }));
  reports("race", go(64, [] { reinterpret_cast<int*>(emu::dyn_smem())[threadIdx.x % 33] = 1; }));
  const auto exchange = [](bool first, bool second) {
    return go(64, [=] {
      int* const s = reinterpret_cast<int*>(emu::dyn_smem());
      s[threadIdx.x] = threadIdx.x;
      if (first) __syncthreads();
      out[threadIdx.x] = s[threadIdx.x ^ 32];
      if (second) __syncthreads();
      s[threadIdx.x] = 0;
    });
  };
  completes("an exchange between two barriers", exchange(true, true));
  reports("race", exchange(true, false));
  CHECK(!exchange(false, true).error.empty());
  reports("deadlock", go(64, [] {
            if (threadIdx.x < 32) __syncthreads();
          }));
  reports("divergent barrier", go(64, [] {
            if (threadIdx.x < 32)
              __syncthreads();
            else
              __syncthreads();
          }));
  reports("inactive lane", go(32, [] {
            if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
          }));
  reports("divergent warp", go(32, [] {
            if (threadIdx.x < 16)
              __syncwarp();
            else
              __ballot_sync(~0u, true);
          }));
}

// Four blocks add up what each has stored; who comes last reads it all.
Result hand_over(bool release, bool acquire, int order, int blocks = 4) {
  float* const sums = buffer<float>(64 * blocks, "sums", emu::kShared | emu::kWriteOnce);
  unsigned* const ticket = buffer<unsigned>(1, "ticket", emu::kShared);
  *ticket = 0;
  static float total[64];
  Options options;
  options.order = order;
  options.seed = 5;
  const Result r = go(
      64,
      [=] {
        unsigned* const word = reinterpret_cast<unsigned*>(emu::dyn_smem());
        sums[64 * blockIdx.x + threadIdx.x] = float(blockIdx.x + 1);
        __syncthreads();
        if (threadIdx.x == 0) {
          if (release) __threadfence();
          *word = atomicAdd(ticket, 1u);
          if (acquire) __threadfence();
        }
        __syncthreads();
        if (*word != gridDim.x - 1) return;
        float sum = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) sum += sums[64 * b + threadIdx.x];
        total[threadIdx.x] = sum;
      },
      blocks, options);
  if (r.error.empty()) CHECK(total[0] == blocks * (blocks + 1) / 2 && total[63] == total[0]);
  return r;
}

void global_memory() {
  int* const words = buffer<int>(4, "words", 0);
  int* const constant = buffer<int>(4, "constant", emu::kReadOnly);
  int* const once = buffer<int>(4, "once", emu::kWriteOnce);
  reports("out of bounds: 4 bytes at words+16 of 16", go(1, [=] { words[4] = 1; }));
  reports("out of bounds", go(1, [=] { words[-1] = 1; }));
  reports("read-only", go(1, [=] { constant[0] = 1; }));
  reports("stored twice", go(2, [=] { once[0] = 1; }));
  reports("misaligned",
          go(1, [=] { *reinterpret_cast<volatile int*>(reinterpret_cast<char*>(words) + 2) = 1; }));
  for (int order = 0; order < 3; ++order) {
    completes("a hand-over between blocks", hand_over(true, true, order));
    reports("without barrier, or fence", hand_over(false, true, order));
    reports("without barrier, or fence", hand_over(true, false, order));
  }
  completes("more blocks than run at a time", hand_over(true, true, 0, 9));
}

void formats() {
  using resnet_fused::sm80::round_to_tf32;
  CHECK(round_to_tf32(bits_of(1.f)) == bits_of(1.f));
  CHECK(round_to_tf32(bits_of(1.f + 0x1p-11f)) == bits_of(1.f + 0x1p-10f));  // ties away
  CHECK(round_to_tf32(bits_of(-1.f - 0x1p-11f)) == bits_of(-1.f - 0x1p-10f));
  CHECK(round_to_tf32(bits_of(1.f + 0x1p-12f)) == bits_of(1.f));
  CHECK(round_to_tf32(bits_of(INFINITY)) == bits_of(INFINITY));
  float nan;
  const uint32_t rounded = round_to_tf32(0x7fc00000u);
  memcpy(&nan, &rounded, 4);
  CHECK(nan != nan);
}

}  // namespace

// Returns how much was wrong.
extern "C" int emulator_selftest() {
  emu::dev_reset();
  collectives();
  matrices();
  products(emu::kF16, 16, [](float first, float second) {
    return __half_as_ushort(__float2half_rn(first)) |
           uint32_t(__half_as_ushort(__float2half_rn(second))) << 16;
  });
  products(emu::kBF16, 16, [](float first, float second) {
    return bits_of(first) >> 16 | (bits_of(second) & 0xffff0000u);
  });
  products(emu::kTF32, 8, [](float first, float) { return bits_of(first); });
  plain_operands();
  copies();
  shared_memory();
  global_memory();
  formats();
  fflush(stdout);
  return failures;
}
