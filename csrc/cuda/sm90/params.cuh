// Fills the kernel's parameters, tensor maps included; shared by the launcher and the emulation.
#pragma once

#include "cuda/sm90/config.cuh"
#include "cuda/sm90/launch.h"

namespace resnet_fused::sm90 {

// Null, or why TMA refused a tensor.
inline const char* fill(KernelParams* k, const Problem& p, const Choice& choice,
                        const Operands& o) {
  const Tile& t = kTiles[choice.tile].tile;
  *k = {};
  k->schedule = schedule_of(p, t, choice.splits);
  k->reduction = reduction_of(p, t.chunk);
  k->stride_h = p.stride_h;
  k->stride_w = p.stride_w;
  k->pad_h = p.pad_h;
  k->pad_w = p.pad_w;
  k->dilation_h = p.dilation_h;
  k->dilation_w = p.dilation_w;
  k->shortcut_stride_h = p.shortcut_stride_h;
  k->shortcut_stride_w = p.shortcut_stride_w;
  k->relu = o.relu;
  k->scale = o.scale;
  k->shift = o.shift;
  k->shortcut_scale = o.shortcut_scale;
  k->shortcut_shift = o.shortcut_shift;
  k->residual = o.residual;
  k->y = o.y;
  k->partial = o.partial;
  k->tickets = o.tickets;
  const bool b = o.bfloat16;
  const char* why = encode(input_fields(o.x, b, p, t), &k->x);
  if (!why) why = encode(weight_fields(o.weight, b, p.k, p.r * p.s, p.c, t), &k->weight);
  if (!p.shortcut_c) return why;
  if (!why) why = encode(shortcut_fields(o.shortcut_x, b, p, t), &k->shortcut_x);
  if (!why)
    why = encode(weight_fields(o.shortcut_weight, b, p.k, 1, p.shortcut_c, t), &k->shortcut_weight);
  return why;
}

}  // namespace resnet_fused::sm90
