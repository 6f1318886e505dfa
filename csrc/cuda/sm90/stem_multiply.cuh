// One row of the convolution: from weights and expanded rows in shared memory to the sums of 64
// channels and `kN` outputs.
#pragma once

#include "cuda/sm90/stem_rows.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace resnet_fused::sm90 {

// slot: the ring's row under the first row of the filter.
template <typename T, int kN>
RF_DEVICE void multiply_row(float (&sum)[kN / 2], const StemParams& p, uint32_t weights,
                            uint32_t ring, int slot) {
  const StemLayout& l = p.layout;
  // Chunks side by side and groups of eight rows: of channels, of outputs.
  uint64_t a = plain_descriptor(weights, 16 * kStemChannels, 128);
  uint64_t b = plain_descriptor(ring + slot * l.ring_pitch, 16, 128);
  int steps = p.problem.r * l.chunks / 2, chunk = 0;
  bool keep = false;
  hold_registers(sum);
#pragma unroll 1
  do {
    wgmma_fence();  // once would do, if the compiler saw it
    Wgmma<T, kN>::issue(sum, a, b, keep);
    wgmma_commit();
    keep = true;
    a += 2 * kStemChannels;  // in units of 16 bytes
    chunk += 2;
    const bool wrap = chunk == l.chunks;
    if (wrap) slot = slot + 1 < l.ring_rows ? slot + 1 : 0;
    if (wrap) chunk = 0;
    b = plain_descriptor(ring + slot * l.ring_pitch + 16 * chunk, 16, 128);
  } while (--steps);
  wgmma_wait<0>();
  hold_registers(sum);
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
