// The stem's kernel, see stem.h: a block is one warpgroup, and several blocks share a
// multiprocessor, so that one's products run while others expand rows and pool.
//
// A pooled row takes one barrier, behind the expansion of the rows that it adds. Rows of the next
// are fetched while this one's products run. The ring is large enough that the next expansion may
// begin while slow warps still multiply; only a band's first pooled row takes two barriers more.
#pragma once

#include "cuda/sm90/stem_pool.cuh"

namespace resnet_fused::sm90 {

template <typename T, int kTile>
__global__ void __launch_bounds__(kStemThreads, kStemTiles[kTile].blocks_per_sm)
    stem_kernel(const __grid_constant__ StemParams p) {
  constexpr int kN = kStemTiles[kTile].columns;
  RF_DYNAMIC_SHARED(shared);
  const int thread = int(threadIdx.x), warp = thread >> 5, lane = thread & 31;
  const int channel = int(blockIdx.y) * kStemChannels;
  const StemProblem& q = p.problem;
  const StemLayout& l = p.layout;
  uint8_t *const weights = shared, *const raw = shared + l.raw, *const ring = shared + l.ring;

  wait_for_earlier_kernels();
  let_next_kernel_start();
  int item = int(blockIdx.x);
  StemBand band = stem_band(p, kN, item);
  StemRows rows = stem_rows(p, band, band.row);
  fetch_weights(p, ring, channel, thread);
  fetch_rows(p, raw, rows, warp, lane);
  const StemAffine affine = stem_affine(p, channel + 16 * warp + lane / 4);
  sm80::copies_wait<1>();
  __syncthreads();  // the weights have landed for all
  expand_weights(p, ring, weights, channel, thread);

  float sum[kN / 2];
  uint32_t best[kN / 8][2];
#pragma unroll 1
  while (true) {
    __syncthreads();           // all have expanded the weights, or computed the band before
    int slot = 0, window = 0;  // of the ring: the next row's, and the next window's first
    bool masked = false;
#pragma unroll
    for (auto& pair : best) pair[0] = pair[1] = sm80::minus_infinities(T());
    const StemBand now = band;
#pragma unroll 1
    for (int row = now.row; row < now.end; ++row) {
      sm80::copies_wait<0>();
      __syncwarp();
      const bool strange = expand_rows<T>(p, raw, ring, rows, slot, warp, lane);
      slot += rows.count;
      if (slot >= l.ring_rows) slot -= l.ring_rows;
      async_proxy_fence();
      masked |= group_any<kStemThreads>(1, strange && p.masks);  // all rows are there
      if (row + 1 < now.end) {
        rows = stem_rows(p, now, row + 1);
        fetch_rows(p, raw, rows, warp, lane);
      } else if (item += int(gridDim.x); item < p.items) {
        band = stem_band(p, kN, item);
        rows = stem_rows(p, band, band.row);
        fetch_rows(p, raw, rows, warp, lane);
      }
      // The row above, which the pooled row before has computed unless it is another band's; two
      // more, of which the second may be below the map.
      const bool last = 2 * row + 1 < p.out_h;
#pragma unroll 1
      for (int part = row == now.row && row > 0 ? 0 : 1; part < 2 + last; ++part) {
        if (masked) {
          multiply_row_masked<T, kN>(sum, p, weights, ring, window, warp, lane);
        } else {
          multiply_row<T, kN>(sum, p, shared_address(weights), shared_address(ring), window);
        }
        window += q.stride_h;
        if (window >= l.ring_rows) window -= l.ring_rows;
        if (part == 0) __syncthreads();  // the ring has no room for this row's inputs besides
        if (part < 2) take_row<T, kN>(best, sum, affine);
      }
      pool_row<T, kN>(best, sum, last, affine, p, now, row, channel, warp, lane);
    }
    if (item >= p.items) break;
  }
}

}  // namespace resnet_fused::sm90
