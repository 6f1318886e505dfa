// The entry for the tests of the tail's kernel: a convolution and the 1 x 1 behind it in one.
#include <cstring>

#include "cuda/sm80/tail.cuh"

using namespace resnet_fused::sm80;

namespace {

struct Run {
  TailProblem problem;
  int type, relu, last_relu, order;
  const void *x, *weight;
  const float *scale, *shift;
  const void* last_weight;
  const float *last_scale, *last_shift;
  const void* residual;
  void* y;
  char error[800];
};

template <typename T>
void kernel_of(int tile, const TailParams& p) {
  if (tile == 0) {
    tail_kernel<T, 0>(p);
  } else {
    tail_kernel<T, 1>(p);
  }
}

}  // namespace

extern "C" void tail_run(Run* r) {
  const TailProblem& p = r->problem;
  r->error[0] = 0;
  const std::string why = tail_refuses(p);
  if (!why.empty()) {
    snprintf(r->error, sizeof r->error, "refused: %s", why.c_str());
    return;
  }
  emu::dev_reset();
  const auto in = [](const void* from, size_t bytes, const char* name) -> void* {
    if (!from) return nullptr;
    void* const d = emu::dev_alloc(bytes, name, emu::kReadOnly);
    memcpy(d, from, bytes);
    return d;
  };
  const auto floats = [&](const float* from, int count, const char* name) {
    return static_cast<float*>(in(from, 4 * count, name));
  };
  const Problem& q = p.first;
  const size_t y_bytes = size_t(2) * pixels(q) * p.k;
  TailOperands o{};
  o.relu = r->relu;
  o.last_relu = r->last_relu;
  o.x = in(r->x, size_t(2) * q.n * q.h * q.w * q.c, "x");
  o.weight = in(r->weight, size_t(2) * q.k * q.r * q.s * q.c, "weight");
  o.scale = floats(r->scale, q.k, "scale");
  o.shift = floats(r->shift, q.k, "shift");
  o.last_weight = in(r->last_weight, size_t(2) * p.k * q.k, "last_weight");
  o.last_scale = floats(r->last_scale, p.k, "last_scale");
  o.last_shift = floats(r->last_shift, p.k, "last_shift");
  o.residual = in(r->residual, y_bytes, "residual");
  o.y = emu::dev_alloc(y_bytes, "y", emu::kWriteOnce);
  const TailParams params = tail_params(p, o);
  const int tile = tail_tile(p);
  const Tile& t = kTailTiles[tile].tile;
  emu::Options options;
  options.order = std::min(r->order, 2);  // 2 and more: random, by this seed
  options.seed = uint32_t(r->order);
  [[maybe_unused]] const bool half = Type(r->type) == Type::kFloat16;
  const emu::Result result = emu::launch(
      dim3(tail_blocks(p)), dim3(threads(t)), tail_shared_bytes(t),
      [&] {
#ifndef EMULATED_TILES  // planted bugs need one type
        if (half) return kernel_of<__half>(tile, params);
#endif
        kernel_of<__nv_bfloat16>(tile, params);
      },
      options);
  snprintf(r->error, sizeof r->error, "%s", result.error.c_str());
  if (!r->error[0] && result.stats.bank_conflicts)
    snprintf(r->error, sizeof r->error, "ldmatrix met %ld bank conflicts",
             long(result.stats.bank_conflicts));
  memcpy(r->y, o.y, y_bytes);
}

// ---- the plan ----
extern "C" void tail_why_not(const TailProblem* p, char* why, int size) {
  snprintf(why, size, "%s", tail_refuses(*p).c_str());
}
extern "C" int tail_shared(int tile) { return tail_shared_bytes(kTailTiles[tile].tile); }
extern "C" int tail_resident(int tile) { return kTailTiles[tile].blocks_per_sm; }
