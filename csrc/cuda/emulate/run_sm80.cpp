// The entry for the tests: copies tensors into guarded buffers, runs the kernel, copies y back.
#include <cstring>

#include "cuda/kept_tickets.h"
#include "cuda/sm80/add_relu.cuh"
#include "cuda/sm80/kernels.cuh"
#include "cuda/sm80/plan.h"

// Which tiles are compiled, bit by bit; planted bugs need few.
#ifndef EMULATED_TILES
#define EMULATED_TILES ~0u
#define EMULATED_TILES_FLOAT16 0x24  // 64x64 and any64x64: the rest differ by conversions only
#else
#define EMULATED_TILES_FLOAT16 0u
#endif

using namespace resnet_fused::sm80;

namespace {

struct Run {
  Problem problem;
  Choice choice;
  int type, relu, launches, order, race;
  const void *x, *weight, *shortcut_x, *shortcut_weight;
  const float *scale, *shift, *shortcut_scale, *shortcut_shift;
  const void* residual;
  void* y;
  char error[800];
};

Kernel instance_of(Type type, int tile, bool shortcut) {
  switch (type) {
    case Type::kFloat16:
      return kernel_of<__half, Math::kTensor, EMULATED_TILES_FLOAT16>(tile, shortcut);
    case Type::kBFloat16:
      return kernel_of<__nv_bfloat16, Math::kTensor, EMULATED_TILES>(tile, shortcut);
    case Type::kTf32:
      return kernel_of<float, Math::kTf32, EMULATED_TILES>(tile, shortcut);
    default:
      return kernel_of<float, Math::kFloat32, EMULATED_TILES>(tile, shortcut);
  }
}

}  // namespace

extern "C" void sm80_run(Run* r) {
  const Problem& p = r->problem;
  const Type type = Type(r->type);
  r->error[0] = 0;
  const std::string why = refuses(p, type, r->choice);
  if (!why.empty()) {
    snprintf(r->error, sizeof r->error, "refused: %s", why.c_str());
    return;
  }
  emu::dev_reset();
  const size_t size = element_bytes(type);
  const auto in = [](const void* from, size_t bytes, const char* name) -> void* {
    if (!from) return nullptr;
    void* const d = emu::dev_alloc(bytes, name, emu::kReadOnly);
    memcpy(d, from, bytes);
    return d;
  };
  const size_t y_bytes = size * pixels(p) * p.k;
  const auto floats = [&](const float* from, const char* name) {
    return static_cast<float*>(in(from, 4 * p.k, name));
  };
  Operands o{};
  o.relu = r->relu;
  o.x = in(r->x, size * p.n * p.h * p.w * p.c, "x");
  o.weight = in(r->weight, size * p.k * p.r * p.s * group_in(p), "weight");
  o.shortcut_x =
      in(r->shortcut_x, size * p.n * p.shortcut_h * p.shortcut_w * p.shortcut_c, "shortcut_x");
  o.shortcut_weight = in(r->shortcut_weight, size * p.k * p.shortcut_c, "shortcut_weight");
  o.scale = floats(r->scale, "scale");
  o.shift = floats(r->shift, "shift");
  o.shortcut_scale = floats(r->shortcut_scale, "shortcut_scale");
  o.shortcut_shift = floats(r->shortcut_shift, "shortcut_shift");
  o.residual = in(r->residual, y_bytes, "residual");
  const Workspace workspace = workspace_of(p, type, r->choice);
  if (workspace.tickets) {
    o.tickets =
        static_cast<unsigned*>(emu::dev_alloc(4 * workspace.tickets, "tickets", emu::kShared));
    memset(o.tickets, 0, 4 * workspace.tickets);
  }
  const Grid grid = grid_of(p, type, r->choice);
  const Kernel kernel = instance_of(type, r->choice.tile, p.shortcut_c > 0);
  if (!kernel) {
    snprintf(r->error, sizeof r->error, "this tile is not compiled");
    return;
  }
  emu::Options options;
  options.order = std::min(r->order, 2);  // 2 and more: random, by this seed
  options.seed = uint32_t(r->order);
  options.race = options.uninit = r->race;
  // Launches share tickets, and each writes to memory of its own.
  for (int launch = 0; launch < r->launches && !r->error[0]; ++launch) {
    o.y = emu::dev_alloc(y_bytes, "y", emu::kWriteOnce);
    if (workspace.tickets)
      o.partial = static_cast<float*>(
          emu::dev_alloc(4 * workspace.partial_floats, "partial", emu::kWriteOnce | emu::kShared));
    const KernelParams params = params_of(p, type, r->choice, o);
    const emu::Result result = emu::launch(
        dim3(grid.tiles, grid.splits), dim3(grid.threads), grid.shared_bytes,
        [&] { kernel(params); }, options);
    snprintf(r->error, sizeof r->error, "%s", result.error.c_str());
    if (!r->error[0] && result.stats.bank_conflicts)
      snprintf(r->error, sizeof r->error, "ldmatrix met %ld bank conflicts",
               long(result.stats.bank_conflicts));
    for (int64_t i = 0; i < workspace.tickets && !r->error[0]; ++i)
      if (o.tickets[i]) snprintf(r->error, sizeof r->error, "ticket %ld was not reset", long(i));
    if (launch && !r->error[0] && memcmp(r->y, o.y, y_bytes))
      snprintf(r->error, sizeof r->error, "launch %d gave other values", launch);
    memcpy(r->y, o.y, y_bytes);
  }
}

// ---- add_relu ----
namespace {

// shift: elements between an allocation, which is aligned, and what the kernel is given.
template <typename T>
emu::Result add_relu_of(const void* a, const void* b, void* y, int64_t count, int shift,
                        int blocks) {
  emu::dev_reset();
  const auto room = [&](const char* name, int flags) {
    return static_cast<T*>(emu::dev_alloc(sizeof(T) * (count + shift), name, flags)) + shift;
  };
  T* const left = room("a", emu::kReadOnly);
  T* const right = room("b", emu::kReadOnly);
  T* const out = room("y", emu::kWriteOnce);
  memcpy(left, a, sizeof(T) * count);
  memcpy(right, b, sizeof(T) * count);
  const auto result = emu::launch(dim3(blocks), dim3(kPointwiseThreads), 0, [&] {
    add_relu_kernel<T>(left, right, out, count, shift * sizeof(T) % 16 == 0);
  });
  memcpy(y, out, sizeof(T) * count);
  return result;
}

}  // namespace

extern "C" void sm80_add_relu(int type, const void* a, const void* b, void* y, int64_t count,
                              int shift, int blocks, char* error, int size) {
  const auto run = Type(type) == Type::kBFloat16  ? add_relu_of<__nv_bfloat16>
                   : Type(type) == Type::kFloat16 ? add_relu_of<__half>
                                                  : add_relu_of<float>;
  snprintf(error, size, "%s", run(a, b, y, count, shift, blocks).error.c_str());
}

// ---- the plan, which the tests hold too ----
extern "C" int sm80_tile_count() { return kTileCount; }
extern "C" const char* sm80_tile_name(int tile) { return kTiles[tile].name; }
extern "C" int sm80_tile_shared_bytes(int tile) { return shared_bytes(kTiles[tile].tile); }
extern "C" void sm80_refuses(const Problem* p, char* why, int size) {
  snprintf(why, size, "%s", refuses(*p).c_str());
}
extern "C" void sm80_choose(const Problem* p, int type, int multiprocessors, Choice* choice,
                            Grid* grid, Workspace* workspace, char* name, int size) {
  *choice = choose(*p, Type(type), {multiprocessors, 164 << 10});
  *grid = grid_of(*p, Type(type), *choice);
  *workspace = workspace_of(*p, Type(type), *choice);
  snprintf(name, size, "%s", text(*choice).c_str());
}
extern "C" void sm80_ranked(const Problem* p, int type, int multiprocessors, char* names,
                            int size) {
  std::string lines;
  for (const Choice& choice : ranked(*p, Type(type), {multiprocessors, 164 << 10}))
    lines += text(choice) + "\n";
  snprintf(names, size, "%s", lines.c_str());
}
extern "C" int sm80_parse(const char* name, Choice* choice) { return parse(name, choice); }

// ---- kept tickets: of buffers numbered as they are made, 0 where none can be ----
static resnet_fused::cuda::KeptTickets kept;
static uint32_t made[8];
static int next = 0;
extern "C" int64_t kept_tickets(int device, int64_t stream, int64_t count, int fails) {
  uint32_t* const tickets =
      kept.get(device, reinterpret_cast<void*>(stream), count, [&](int64_t room) {
        uint32_t* const fresh = fails ? nullptr : &made[next++];
        if (fresh) *fresh = uint32_t(room);
        return fresh;
      });
  return tickets ? (tickets - made + 1) * (int64_t{1} << 32) + *tickets : 0;
}
