// What the tail's kernel serves, and what it is called with; without the CUDA runtime.
#include "cuda/sm80/tail.h"

#include "check.h"

namespace resnet_fused::sm80 {
namespace {

// The 1 x 1 convolution behind the first.
Problem last_of(const TailProblem& p) {
  Problem last{};
  last.n = p.first.n;
  last.h = out_h(p.first);
  last.w = out_w(p.first);
  last.c = p.first.k;
  last.k = p.k;
  last.r = last.s = last.groups = last.stride_h = last.stride_w = 1;
  last.dilation_h = last.dilation_w = last.shortcut_stride_h = last.shortcut_stride_w = 1;
  return last;
}

}  // namespace

std::string tail_refuses(const TailProblem& p) {
  if (p.first.groups != 1 || p.first.shortcut_c)
    return "its kernel for two convolutions has no groups or shortcut";
  std::string why = refuses(p.first);
  if (why.empty()) why = refuses(last_of(p));
  if (!why.empty()) return why;
  for (const int channels : {p.first.c, p.first.k, p.k})
    if (channels % 8)
      return sentence("its kernel for two convolutions needs channels in multiples of 8, got ",
                      channels);
  if (p.first.k > kMostBetween)
    return sentence("its kernel for two convolutions has at most ", kMostBetween,
                    " channels between them, got ", p.first.k);
  return "";
}

int tail_tile(const TailProblem& p) {
  int tile = 0;
  while (tile + 1 < kTailTileCount && p.first.k > kTailTiles[tile].tile.channels) ++tile;
  return tile;
}

TailParams tail_params(const TailProblem& p, const TailOperands& o) {
  const Tile& tile = kTailTiles[tail_tile(p)].tile;
  const Problem last = last_of(p);
  TailParams k{};
  k.first.problem = p.first;
  k.first.schedule = schedule_of(p.first, tile, 2, 1);
  k.last.problem = last;
  k.last.schedule = schedule_of(last, slice_tile(tile), 2, 1);
  k.first.out_h = k.last.out_h = last.h;
  k.first.out_w = k.last.out_w = last.w;
  k.first.relu = o.relu;
  k.first.x = o.x;
  k.first.weight = o.weight;
  k.first.scale = o.scale;
  k.first.shift = o.shift;
  k.last.relu = o.last_relu;
  k.last.weight = o.last_weight;
  k.last.scale = o.last_scale;
  k.last.shift = o.last_shift;
  k.last.residual = o.residual;
  k.last.y = o.y;
  return k;
}

int tail_blocks(const TailProblem& p) {
  return ceil_div(pixels(p.first), kTailTiles[tail_tile(p)].tile.pixels);
}

}  // namespace resnet_fused::sm80
