// One row of the convolution: from weights and expanded rows in shared memory to the sums of 64
// channels and `kN` outputs.
#pragma once

#include "cuda/sm90/operand.h"
#include "cuda/sm90/stem_rows.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace resnet_fused::sm90 {

// slot: the ring's row under the first row of the filter. kChunks: those of a filter row, or 0, any
// number.
template <typename T, int kN, int kChunks>
RF_DEVICE void multiply_row(float (&sum)[kN / 2], const StemParams& p, uint32_t weights,
                            uint32_t ring, int slot) {
  constexpr int kStep = kChunks ? kChunks : 2;
  const StemLayout& l = p.layout;
  // Chunks side by side and groups of eight rows: of channels, of outputs.
  uint64_t a = plain_descriptor(weights, 16 * kStemChannels, 128);
  int steps = p.problem.r * l.chunks / kStep, chunk = 0;
  bool keep = false;
  hold_registers(sum);
#pragma unroll 1
  do {
    const uint64_t b = plain_descriptor(ring + slot * l.ring_pitch + 16 * chunk, 16, 128);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < kStep; c += 2) {
      Wgmma<T, kN>::issue(sum, a, b + c, keep);
      keep = true;
      a += 2 * kStemChannels;  // in units of 16 bytes
    }
    wgmma_commit();
    chunk += kStep;
    const bool end = kChunks || chunk == l.chunks;
    if (end) slot = slot + 1 < l.ring_rows ? slot + 1 : 0;
    if (end) chunk = 0;
  } while (--steps);
  wgmma_wait<0>();
  hold_registers(sum);
}
template <typename T, int kN>
RF_DEVICE void multiply_row(float (&sum)[kN / 2], const StemParams& p, uint32_t weights,
                            uint32_t ring, int slot) {
  if (p.layout.chunks == 4) {  // widths of 5 to 8
    multiply_row<T, kN, 4>(sum, p, weights, ring, slot);
  } else {
    multiply_row<T, kN, 0>(sum, p, weights, ring, slot);
  }
}

// The same, but a tap behind the window counts for nothing, whatever it holds. A warp has the same
// 16 channels, and so the same sums.
template <typename T, int kN>
RF_DEVICE void multiply_row_masked(float (&sum)[kN / 2], const StemParams& p,
                                   const uint8_t* weights, const uint8_t* ring, int slot, int warp,
                                   int lane) {
  const StemLayout& l = p.layout;
  const uint8_t* from = weights + 16 * (16 * warp + lane / 4) + lane % 4 * 4;
  const auto word = [](const uint8_t* at) { return *reinterpret_cast<const uint32_t*>(at); };
#pragma unroll
  for (float& s : sum) s = 0.f;
#pragma unroll 1
  for (int r = 0; r < p.problem.r; ++r) {
    const uint8_t* const windows = ring + slot * l.ring_pitch + 16 * (lane / 4) + lane % 4 * 4;
#pragma unroll 1
    for (int chunk = 0; chunk < l.chunks; chunk += 2, from += 2 * 16 * kStemChannels) {
      const uint32_t a[4] = {word(from), word(from + 16 * 8), word(from + 16 * kStemChannels),
                             word(from + 16 * (kStemChannels + 8))};
      uint32_t mask[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) mask[i] = 2 * (chunk + i) + lane % 4 / 2 < p.problem.s ? ~0u : 0u;
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        const uint8_t* const at = windows + 16 * (8 * j + chunk);
        const uint32_t b[2] = {word(at) & mask[0], word(at + 16) & mask[1]};
        float part[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) part[e] = sum[4 * j + e];
        sm80::multiply(part, a, b, T());
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[4 * j + e] = part[e];
      }
    }
    slot = slot + 1 < l.ring_rows ? slot + 1 : 0;
  }
}

}  // namespace resnet_fused::sm90
