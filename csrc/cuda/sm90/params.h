// What the kernel is called with; filled, tensor maps included, by the launcher and the emulation.
#pragma once

#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace resnet_fused::sm90 {

struct KernelParams {
  TensorMap x, weight, shortcut_x, shortcut_weight;
  TensorMap y_map, residual_map;  // where there are two consumers
  int place_pixels;               // of their boxes
  Schedule schedule;
  Reduction reduction;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int shortcut_stride_h, shortcut_stride_w;
  bool relu;
  bool early_weights;                            // may be loaded ahead of the kernel before's end
  const float *scale, *shift;                    // [K]
  const float *shortcut_scale, *shortcut_shift;  // [K], with a shortcut
  const void* residual;                          // [pixels][K] or null
  void* y;                                       // [pixels][K]
};

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
  const bool b = o.bfloat16;
  const char* why = encode(input_fields(o.x, b, p, t), &k->x);
  if (!why) why = encode(weight_fields(o.weight, b, p.k, p.r * p.s, p.c, t), &k->weight);
  if (!why && t.consumers == 2) {
    const int pixels = k->schedule.pixels, box = place_pixels(t);
    k->place_pixels = box;
    why = encode(output_fields(o.y, b, 1, 1, pixels, p.k, 1, 1, box), &k->y_map);
    if (!why && o.residual)
      why = encode(output_fields(o.residual, b, 1, 1, pixels, p.k, 1, 1, box), &k->residual_map);
  }
  if (!p.shortcut_c) return why;
  if (!why) why = encode(shortcut_fields(o.shortcut_x, b, p, t), &k->shortcut_x);
  if (!why)
    why = encode(weight_fields(o.shortcut_weight, b, p.k, 1, p.shortcut_c, t), &k->shortcut_weight);
  return why;
}

}  // namespace resnet_fused::sm90
