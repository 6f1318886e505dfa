// The tap-shift kernel: see tap_shift.h for the idea, conv_kernel.cuh for the rest. Channels are on
// M, positions on N. Two rings: windows of the input, and weights, a stage per tap.
#pragma once

#include "cuda/sm90/conv_kernel.cuh"
#include "cuda/sm90/tap_shift.h"

namespace resnet_fused::sm90 {

template <int kN_, bool kShared_>
struct TapShiftConfig {
  static constexpr bool kShared = kShared_, kPingPong = !kShared_, kChannelsOnM = true;
  static constexpr TapShiftStages kStages = tap_shift_stages(kShared);
  static constexpr int kN = kN_, kMBlocks = 1, kSpan = 128, kTileChannels = kStages.channels,
                       kTeam = kShared ? 256 : 128, kThreads = 384;
  static constexpr int kWeightStages = kStages.weights, kWindowStages = kStages.windows,
                       kWeightBytes = kTileChannels * kSpan;
};

template <typename C>
struct TapShiftMemory {
  uint32_t base, window_bytes, place_bytes;
  RF_DEVICE uint32_t weights(uint32_t s) const { return base + s * C::kWeightBytes; }
  RF_DEVICE uint32_t window(uint32_t s) const {
    return base + C::kWeightStages * C::kWeightBytes + s * window_bytes;
  }
  RF_DEVICE uint32_t place(uint32_t w) const { return window(C::kWindowStages) + w * place_bytes; }
  RF_DEVICE uint32_t barrier(uint32_t i) const { return place(2) + 8 * i; }
  RF_DEVICE uint32_t weights_full(uint32_t s) const { return barrier(2 * s); }
  RF_DEVICE uint32_t weights_empty(uint32_t s) const { return barrier(2 * s + 1); }
  RF_DEVICE uint32_t window_full(uint32_t s) const { return weights_full(C::kWeightStages + s); }
  RF_DEVICE uint32_t window_empty(uint32_t s) const { return weights_empty(C::kWeightStages + s); }
  RF_DEVICE uint32_t turn(uint32_t w) const {
    return barrier(2 * (C::kWeightStages + C::kWindowStages) + w);
  }
  RF_DEVICE uint32_t landed(uint32_t w) const { return turn(2 + w); }
};

// One thread.
template <typename C, bool kShortcut>
RF_DEVICE void produce_windows(const TapShiftParams& p, const TapShiftMemory<C>& memory) {
  const uint64_t keep = keep_in_l2();
  const KernelParams& conv = p.conv;
  const int taps = p.kernel_h * conv.reduction.kernel_w;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  Ring weights{0, 0}, windows{0, 0};
#pragma unroll 1
  for (int item = blockIdx.x; item < p.items; item += gridDim.x) {
    const WindowTile t = window_tile(p.window, p.channel_tiles, C::kTileChannels, item);
#pragma unroll 1
    for (int chunk = 0; chunk < p.chunks + (kShortcut ? p.shortcut_chunks : 0); ++chunk) {
      const bool shortcut = kShortcut && chunk >= p.chunks;
      const int c = 64 * (shortcut ? chunk - p.chunks : chunk);
      const uint32_t full = memory.window_full(windows.stage);
      barrier_wait(memory.window_empty(windows.stage), empty_parity(windows));
      barrier_expect(full, p.window.box_positions * 128);
      // The shortcut's window has the same positions: those of every second pixel.
      const int stride = shortcut ? 2 : 1;
      tma_window(memory.window(windows.stage), shortcut ? &conv.shortcut_x : &conv.x, full, c,
                 -stride * conv.pad_w, stride * (t.row - conv.pad_h), t.image);
      ring_next(windows, C::kWindowStages);
#pragma unroll 1
      for (int tap = 0; tap < (shortcut ? 1 : taps); ++tap) {
        barrier_wait(memory.weights_empty(weights.stage), empty_parity(weights));
        barrier_expect(memory.weights_full(weights.stage), C::kWeightBytes);
        tma_tile(memory.weights(weights.stage), shortcut ? &conv.shortcut_weight : &conv.weight,
                 memory.weights_full(weights.stage), c, tap, t.channel, keep);
        ring_next(weights, C::kWeightStages);
      }
    }
  }
}

template <typename T, typename C, bool kShortcut>
RF_DEVICE void consume_windows(const TapShiftParams& p, const TapShiftMemory<C>& memory,
                               uint8_t* shared, int warpgroup) {
  const KernelParams& conv = p.conv;
  const int tid = int(threadIdx.x) & 127, lane = tid & 31;
  const int team_thread = C::kShared ? 128 * warpgroup + tid : tid;
  const int team_barrier = kTeam0 + (C::kShared ? 0 : warpgroup);
  const int row = C::kShared ? 64 * warpgroup : 0;  // this warpgroup's channels of the tile
  const int taps = p.kernel_h * conv.reduction.kernel_w;
  const int chunks = p.chunks + (kShortcut ? p.shortcut_chunks : 0);
  const int steps = p.chunks * taps + (kShortcut ? p.shortcut_chunks : 0);
  float sum[1][C::kN / 2];
  uint32_t step = 0, chunk_count = 0;  // of this block, in the producer's order

  wait_for_earlier_kernels();
  Place<C::kN, 1> place{memory.place(warpgroup), memory.landed(warpgroup), 0};
#pragma unroll 1
  for (int i = 0, item = blockIdx.x; item < p.items; item += gridDim.x, ++i) {
    Ring weights = ring_at(step, C::kWeightStages),
         windows = ring_at(chunk_count, C::kWindowStages);
    step += steps;
    chunk_count += chunks;
    if (C::kPingPong && (i & 1) != warpgroup) continue;
    const WindowTile t = window_tile(p.window, p.channel_tiles, C::kTileChannels, item);
    const int channel = t.channel + row;
    if (tid == 0) place.begin(conv, channel, 0, t.row, t.image);
    if (C::kPingPong && i > 0) barrier_wait(memory.turn(warpgroup), turn_parity(i));

    // Chunks `begin` to `end`, each under all its taps; all that they read is released at the end.
    const auto multiply = [&](int begin, int end, bool shortcut, auto before_products) {
      uint32_t last_weights = 0, last_window = 0;
      bool window_done = false;
      hold_registers(sum[0]);
#pragma unroll 1
      for (int chunk = begin; chunk < end; ++chunk) {
        barrier_wait(memory.window_full(windows.stage), full_parity(windows));
        int r = 0, s = 0;
#pragma unroll 1
        for (int tap = 0; tap < (shortcut ? 1 : taps); ++tap) {
          barrier_wait(memory.weights_full(weights.stage), full_parity(weights));
          if (C::kPingPong && chunk == chunks - 1 && tap == (shortcut ? 1 : taps) - 1 && lane == 0)
            barrier_arrive(memory.turn(warpgroup ^ 1));
          before_products(weights.stage);
          const int shift = shortcut ? conv.pad_h * p.window.pitch + conv.pad_w
                                     : r * conv.dilation_h * p.window.pitch + s * conv.dilation_w;
          const uint64_t a =
              operand_descriptor(memory.weights(weights.stage) + row * C::kSpan, C::kSpan);
          const uint64_t b =
              operand_descriptor(memory.window(windows.stage) + shift * C::kSpan, C::kSpan);
          wgmma_fence();
#pragma unroll
          for (int c = 0; c < 4; ++c)
            Wgmma<T, C::kN>::issue(sum[0], a + 2 * c, b + 2 * c, chunk > 0 || tap > 0 || c > 0);
          wgmma_commit();
          wgmma_wait<1>();  // the step before has ended
          if (lane == 0) {
            if (chunk > begin || tap > 0) barrier_arrive(memory.weights_empty(last_weights));
            if (window_done) barrier_arrive(memory.window_empty(last_window));
          }
          window_done = false;
          last_weights = weights.stage;
          ring_next(weights, C::kWeightStages);
          if (++s == conv.reduction.kernel_w) {
            s = 0;
            ++r;
          }
        }
        window_done = true;
        last_window = windows.stage;
        ring_next(windows, C::kWindowStages);
      }
      wgmma_wait<0>();
      hold_registers(sum[0]);
      if (lane == 0) {
        barrier_arrive(memory.weights_empty(last_weights));
        barrier_arrive(memory.window_empty(last_window));
      }
    };
    multiply(0, p.chunks, false, [](uint32_t) {});
    if constexpr (kShortcut) {
      rescale<C>(sum, conv, channel, tid);
      const bool clear = any_dead<C>(conv, t.channel, team_thread, team_barrier);
      multiply(p.chunks, chunks, true, [&](uint32_t stage) {
        if (clear)
          clear_dead_rows<C>(shared + stage * C::kWeightBytes, conv, t.channel, team_thread,
                             team_barrier);
      });
    }
    // Positions lie as the output's map has them, those without a pixel outside the tensor.
    store_by_tma<T, C, kShortcut>(sum, conv, place, channel, 0, t.row, t.image, tid,
                                  kWarpgroup0 + warpgroup);
  }
  if (tid == 0) wait_for_stores();
}

template <typename T, int kN, bool kShared, bool kShortcut>
__global__ void __launch_bounds__(384, 1)
    tap_shift_kernel(const __grid_constant__ TapShiftParams p) {
  using C = TapShiftConfig<kN, kShared>;
  RF_DYNAMIC_SHARED(raw);
  const uint32_t start = shared_address(raw);
  const TapShiftMemory<C> memory{(start + 1023u) & ~1023u, uint32_t(p.window.bytes),
                                 uint32_t(p.window.place_bytes)};
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) >> 7, 0);
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) >> 5, 0);

  if (warp == 0 && elect_one()) {
#pragma unroll 1
    for (int s = 0; s < C::kWeightStages + C::kWindowStages; ++s) {
      barrier_init(memory.weights_full(s), 1);
      barrier_init(memory.weights_empty(s), C::kTeam / 32);
    }
    barrier_init(memory.turn(0), 4);
    barrier_init(memory.turn(1), 4);
    barrier_init(memory.landed(0), 1);
    barrier_init(memory.landed(1), 1);
    barrier_init_fence();
  }
  // The zeros behind the windows, which wgmma will read: hence the fence.
  for (int s = 0; s < C::kWindowStages; ++s)
    for (int at = 128 * p.window.box_positions + 16 * int(threadIdx.x); at < p.window.bytes;
         at += 16 * C::kThreads)
      *reinterpret_cast<uint4*>(raw + (memory.window(s) - start) + at) = make_uint4(0, 0, 0, 0);
  // Positions behind the outputs' boxes have no residual.
  for (int w = 0; w < 2; ++w)
    for (int at = 128 * p.conv.place_pixels + 16 * int(threadIdx.x); at < p.window.place_bytes;
         at += 16 * C::kThreads)
      *reinterpret_cast<uint4*>(raw + (memory.place(w) - start) + at) = make_uint4(0, 0, 0, 0);
  async_proxy_fence();
  __syncthreads();

  if (warpgroup == 0) {
    give_registers<40>();
    if (warp == 0 && elect_one()) produce_windows<C, kShortcut>(p, memory);
  } else {
    take_registers<232>();
    consume_windows<T, C, kShortcut>(p, memory, raw + (memory.base - start), warpgroup - 1);
  }
}

}  // namespace resnet_fused::sm90
