// Tap-shift: a convolution of stride 1 that loads each input once instead of once per tap.
//
// A tile is a run of output rows of one image, or a few whole small images. Its window of the
// input, 64 channels at a time, goes to shared memory as one list of positions of 128 bytes, row by
// row, each row preceded by pad_w zeros; those are also the right padding of the row before. Then a
// tap (r, s) of all outputs together is the same list, begun r * dilation_h rows and s * dilation_w
// positions further: wgmma's operand descriptor moves, the data does not. Positions under the zeros
// are computed and dropped. Behind the window lie zeros that TMA never writes, for taps that reach
// over its end.
//
// It relies on an operand that begins at any multiple of 128 bytes, not only of 1024, with the
// 128-byte swizzle by the address bits (base offset 0, since the pattern itself begins at a
// multiple of 1024). The documents do not say so; an H100 does.
//
// With plain im2col every input travels nine times from L2 to shared memory, which is not the bound
// of most layers. On an H100 tap-shift wins with 64 channels at 56 x 56 from 8 images on (51 us
// against 79 at 128) and with 128 at 28 x 28 from 32 images on (51 against 55 at 128), ties with
// 256 channels at 128 images, and loses elsewhere.
#pragma once

#include <string>

#include "cuda/sm90/params.h"

namespace resnet_fused::sm90 {

// Positions that a tile may compute, wgmma's N: kernels are compiled for each, windows chosen among
// them.
constexpr int kTapShiftN[] = {208, 216, 232, 256};
constexpr int kTapShiftNCount = sizeof(kTapShiftN) / sizeof(kTapShiftN[0]);

struct Window {
  int n;  // of kTapShiftN
  int pitch, rows, images, image_pitch;
  int box_w, box_h, box_positions;
  int bytes;                    // of a stage, zeros behind the window included
  int place_rows, place_bytes;  // of an image's outputs; of a warpgroup's outputs on their way
  int row_tiles;                // of an image, where a tile is less than one
};
RF_HD Window window_of(const Problem& p, int rows, int images, int n) {
  Window g;
  g.n = n;
  g.pitch = p.w + p.pad_w;
  g.rows = rows;
  g.images = images;
  g.box_w = g.pitch;
  g.box_h = images > 1 ? p.h + p.pad_h : rows + (p.r - 1) * p.dilation_h;
  g.image_pitch = g.box_h * g.pitch;
  g.box_positions = g.image_pitch * images;
  const int reach = n + (p.r - 1) * p.dilation_h * g.pitch + (p.s - 1) * p.dilation_w;
  const int positions = reach > g.box_positions ? reach : g.box_positions;
  g.bytes = (positions * 128 + 1023) / 1024 * 1024;
  // Positions are rows of pitch, also of outputs; those that no product reaches are outside the
  // map.
  g.place_rows = images > 1 ? g.box_h : rows;
  const int placed = images * g.place_rows * g.pitch;
  g.place_bytes = ((placed > n ? placed : n) * 128 + 1023) / 1024 * 1024;
  g.row_tiles = ceil_div(out_h(p), rows);
  return g;
}
// The last useful position of a tile, plus one.
RF_HD int positions_needed(const Problem& p, int rows, int images) {
  const int pitch = p.w + p.pad_w;
  return ((images - 1) * (p.h + p.pad_h) + rows - 1) * pitch + p.w;
}
RF_HD int window_tiles(const Window& g, int batch) {
  return g.images > 1 ? ceil_div(batch, g.images) : batch * g.row_tiles;
}
struct WindowTile {
  int image, row, channel;  // its first
};
RF_HD WindowTile window_tile(const Window& g, int channel_tiles, int tile_channels, int index) {
  const int tile = index / channel_tiles;
  WindowTile t;
  t.channel = (index - tile * channel_tiles) * tile_channels;
  t.image = g.images > 1 ? tile * g.images : tile / g.row_tiles;
  t.row = g.images > 1 ? 0 : (tile - t.image * g.row_tiles) * g.rows;
  return t;
}
struct TapShiftParams {
  KernelParams conv;  // maps of windows in x and shortcut_x
  Window window;
  int batch, kernel_h, chunks, shortcut_chunks, channel_tiles, items;
};

// Up to 64 channels: two warpgroups take turns, a tile each. More: they share one of 128 channels.
struct TapShiftStages {
  int channels, weights, windows;
};
RF_HD constexpr TapShiftStages tap_shift_stages(bool shared) {
  return shared ? TapShiftStages{128, 4, 2} : TapShiftStages{64, 8, 2};
}
RF_HD int tap_shift_shared_bytes(const Window& g, bool shared) {
  const TapShiftStages s = tap_shift_stages(shared);
  return 1024 + s.weights * s.channels * 128 + s.windows * g.bytes + 2 * g.place_bytes +
         (16 * (s.weights + s.windows) + 32 + 63) / 64 * 64;
}

// Empty where the kernel serves the convolution, else one sentence.
std::string tap_shift_refuses(const Problem& p);
// The window whose positions are used best; n is 0 where none fits.
Window tap_shift_window(const Problem& p);
// Null, or why TMA refused a tensor.
const char* fill(TapShiftParams* k, const Problem& p, const Window& g, const Operands& o);

}  // namespace resnet_fused::sm90
