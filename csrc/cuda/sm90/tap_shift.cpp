#include "cuda/sm90/tap_shift.h"

namespace resnet_fused::sm90 {
namespace {

MapFields window_fields(const void* x, bool bfloat16, int n, int h, int w, int c, const Window& g,
                        int stride) {
  MapFields f = {};
  f.base = x;
  f.bfloat16 = bfloat16;
  f.rank = 4;
  const int size[] = {c, w, h, n}, box[] = {64, g.box_w * stride, g.box_h * stride, g.images};
  for (int i = 0; i < 4; ++i) {
    f.size[i] = size[i];
    f.box[i] = box[i];
    f.stride[i] = i == 1 || i == 2 ? stride : 1;
  }
  f.stride_bytes[0] = 2ull * c;
  f.stride_bytes[1] = 2ull * c * w;
  f.stride_bytes[2] = 2ull * c * w * h;
  f.swizzle_bytes = 128;
  return f;
}

bool fits(const Problem& p, const Window& g) {
  const int stride = p.shortcut_c ? 2 : 1;
  return g.box_h * stride <= 256 && g.images <= 256 &&
         tap_shift_shared_bytes(g, p.k > 64) <= kMostShared;
}

}  // namespace

std::string tap_shift_refuses(const Problem& p) {
  const std::string why = refuses(p);
  if (!why.empty()) return why;
  if (p.stride_h != 1 || p.stride_w != 1) return "tap-shift serves stride 1";
  if (out_h(p) != p.h || out_w(p) != p.w) return "tap-shift serves outputs of the input's size";
  if (p.c % 64 || p.shortcut_c % 64) return "tap-shift needs input channels in multiples of 64";
  if ((p.shortcut_c ? 2 : 1) * (p.w + p.pad_w) > 256)
    return "tap-shift's rows hold 256 positions, 128 with a shortcut";
  if (p.shortcut_c && (p.shortcut_stride_h != 2 || p.shortcut_stride_w != 2))
    return "tap-shift serves shortcuts of stride 2";
  if (!tap_shift_window(p).n) return "tap-shift's window does not fit shared memory";
  return "";
}

Window tap_shift_window(const Problem& p) {
  Window best = {};
  double most = 0;
  const auto offer = [&](int rows, int images, int n, double used) {
    const Window g = window_of(p, rows, images, n);
    if (used > most + 1e-9 && fits(p, g)) best = g, most = used;
  };
  for (int n : kTapShiftN) {
    for (int rows = 1; rows <= p.h && positions_needed(p, rows, 1) <= n; ++rows)
      offer(rows, 1, n, double(p.h) / ceil_div(p.h, rows) * p.w / n);
    for (int images = 2; images <= p.n && positions_needed(p, p.h, images) <= n; ++images)
      offer(p.h, images, n, double(p.n) / ceil_div(p.n, images) * p.h * p.w / n);
  }
  return best;
}

const char* fill(TapShiftParams* k, const Problem& p, const Window& g, const Operands& o) {
  const bool shared = p.k > 64;
  const int channels = tap_shift_stages(shared).channels;
  const Tile weights{true, 1, 0, 64, 0, shared ? kSplitM : kPingPong, 2};  // for their box
  *k = {};
  k->window = g;
  k->batch = p.n;
  k->kernel_h = p.r;
  k->chunks = p.c / 64;
  k->shortcut_chunks = p.shortcut_c / 64;
  k->channel_tiles = ceil_div(p.k, channels);
  k->items = window_tiles(g, p.n) * k->channel_tiles;
  KernelParams& c = k->conv;
  c.schedule.k = p.k;
  c.schedule.p = out_h(p);
  c.schedule.q = out_w(p);
  c.schedule.pixels = p.n * c.schedule.p * c.schedule.q;
  c.reduction.kernel_w = p.s;
  c.pad_h = p.pad_h;
  c.pad_w = p.pad_w;
  c.dilation_h = p.dilation_h;
  c.dilation_w = p.dilation_w;
  c.relu = o.relu;
  c.scale = o.scale;
  c.shift = o.shift;
  c.shortcut_scale = o.shortcut_scale;
  c.shortcut_shift = o.shortcut_shift;
  c.residual = o.residual;
  c.y = o.y;
  const bool b = o.bfloat16;
  const char* why = encode(window_fields(o.x, b, p.n, p.h, p.w, p.c, g, 1), &c.x);
  if (!why) why = encode(weight_fields(o.weight, b, p.k, p.r * p.s, p.c, weights), &c.weight);
  const auto output = [&](const void* to, TensorMap* map) {
    return encode(
        output_fields(to, b, p.n, c.schedule.p, c.schedule.q, p.k, g.images, g.place_rows, g.pitch),
        map);
  };
  c.box_pixels = g.images * g.place_rows * g.pitch;
  if (!why) why = output(o.y, &c.y_map);
  if (!why && o.residual) why = output(o.residual, &c.residual_map);
  if (!p.shortcut_c) return why;
  if (!why)
    why =
        encode(window_fields(o.shortcut_x, b, p.n, p.shortcut_h, p.shortcut_w, p.shortcut_c, g, 2),
               &c.shortcut_x);
  if (!why)
    why = encode(weight_fields(o.shortcut_weight, b, p.k, 1, p.shortcut_c, weights),
                 &c.shortcut_weight);
  return why;
}

}  // namespace resnet_fused::sm90
