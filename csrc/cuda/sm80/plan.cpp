#include "cuda/sm80/plan.h"

#include <algorithm>
#include <cstdio>

#include "check.h"
#include "cuda/remembered.h"
#include "cuda/split_sum.h"

namespace resnet_fused::sm80 {
namespace {

constexpr int64_t kMostElements = 2147483647;
constexpr int kMostSplits = 64;

// Whether every group's channels are whole 16-byte chunks.
bool in_chunks(const Problem& p, Type type) {
  const int elements = 16 / element_bytes(type);
  return group_in(p) % elements == 0 && p.shortcut_c % elements == 0;
}

Schedule schedule(const Problem& p, Type type, const Choice& choice) {
  return schedule_of(p, kTiles[choice.tile].tile, element_bytes(type), choice.splits);
}

// Clocks of Ampere, fitted to no measurement. Products of one multiprocessor a clock: what
// mma.sync and FMA units are documented to do on sm_80.
double macs_per_clock(Type type) {
  return type < Type::kTf32 ? 1024 : type == Type::kTf32 ? 512 : 64;
}
constexpr double kSharedBytesPerClock = 128;  // documented
constexpr double kL2BytesPerClock = 32;       // assumed, per multiprocessor
constexpr double kStepClocks = 60;            // assumed: a barrier and the wait before it
constexpr double kFirstLoadClocks = 700;      // assumed
constexpr double kSplitClocks = 1200;         // assumed: sums out, fences, ticket
constexpr double kSplitRoundClocks = 300;     // assumed: loads of sums, until L2 answers

}  // namespace

std::string refuses(const Problem& p) {
  // Before anything is computed in int.
  const auto is_far = [](int64_t size, int64_t pad, int64_t dilation, int64_t taps) {
    return size + 2 * pad > kMostElements || dilation * (taps - 1) > kMostElements;
  };
  if (is_far(p.h, p.pad_h, p.dilation_h, p.r) || is_far(p.w, p.pad_w, p.dilation_w, p.s))
    return kFar;
  if (p.n < 1 || p.h < 1 || p.w < 1 || p.c < 1 || p.k < 1 || out_h(p) < 1 || out_w(p) < 1)
    return "the tensor is empty";
  const int64_t sizes[] = {int64_t(p.n) * p.h * p.w * p.c, int64_t(p.n) * out_h(p) * out_w(p) * p.k,
                           int64_t(p.n) * p.shortcut_h * p.shortcut_w * p.shortcut_c,
                           int64_t(p.k) * p.r * p.s * group_in(p)};
  for (const int64_t size : sizes)
    if (size > kMostElements)
      return sentence("its indices have 31 bits, and a tensor has ", size, " elements");
  // The walk along the reduction goes up to one step past the last tap of a pixel.
  const int64_t reach = (int64_t(p.dilation_h) * (p.r + 64) + 1) * p.w * p.c +
                        (int64_t(p.dilation_w) * (p.s + 64)) * p.c;
  if (reach > kMostElements || int64_t(p.stride_h) * out_h(p) > (1 << 27) ||
      int64_t(p.stride_w) * out_w(p) > (1 << 27) || std::max(p.pad_h, p.pad_w) > (1 << 26))
    return kFar;
  return "";
}

std::string refuses(const Problem& p, Type type, const Choice& choice) {
  if (choice.tile < 0 || choice.tile >= kTileCount)
    return sentence("there are ", kTileCount, " tiles, and none has the number ", choice.tile);
  if (!has_tile(math_of(type), choice.tile, p.shortcut_c > 0))
    return sentence("the tile ", kTiles[choice.tile].name, " is not compiled for ",
                    math_of(type) == Math::kFloat32 ? "float32 without TF32" : "a shortcut");
  if (choice.splits < 1 || choice.splits > 65535)
    return sentence("splits must lie between 1 and 65535, got ", choice.splits);
  if (choice.tile != kAnyTile && !in_chunks(p, type))
    return sentence("the tile ", kTiles[choice.tile].name, " needs channels in multiples of ",
                    16 / element_bytes(type), ", got ",
                    group_in(p) % (16 / element_bytes(type)) ? group_in(p) : p.shortcut_c);
  return refuses(p);
}

double cost(const Problem& p, Type type, const Choice& choice, const Device& device) {
  const NamedTile& named = kTiles[choice.tile];
  const Tile& t = named.tile;
  const Schedule s = schedule(p, type, choice);
  const int64_t blocks = int64_t(tiles_of(s)) * s.splits;
  const int resident =
      std::max(1, std::min(named.blocks_per_sm, device.shared_bytes / (shared_bytes(t) + 1024)));
  // Blocks that the busiest multiprocessor computes, and how many of them side by side.
  const int64_t each = (blocks + device.multiprocessors - 1) / device.multiprocessors;
  const double steps = double(s.steps) / s.splits;
  const double elements = 16.0 * t.chunks / element_bytes(type);
  const double multiply = t.pixels * t.channels * elements / macs_per_clock(type);
  // Each warp reads its own rows of both operands.
  const double read =
      double(t.warps_n * t.pixels + t.warps_m * t.channels) * 16 * t.chunks / kSharedBytesPerClock;
  const double fill = stage_bytes(t) / kL2BytesPerClock *
                      (choice.tile == kAnyTile ? 16.0 / element_bytes(type) / 2 : 1);
  const double side_by_side = double(std::min<int64_t>(resident, each));
  const double step = std::max({multiply, read, fill, kStepClocks / side_by_side});
  const double outputs = 2.0 * t.pixels * t.channels * element_bytes(type) / kL2BytesPerClock;
  const int sums = t.pixels * t.channels, quads = sums / (4 * threads(t));
  const double split = s.splits > 1 ? kSplitClocks +
                                          kSplitRoundClocks * cuda::split_rounds(quads, s.splits) +
                                          (1 + s.splits) * 4.0 * sums / kL2BytesPerClock
                                    : 0;
  const double rounds = double((each + resident - 1) / resident);
  return each * (steps * step + outputs) + rounds * kFirstLoadClocks + split;
}

namespace {

struct Priced {
  Choice choice;
  double clocks;
};

// A tile with the number of splits that costs least. The tile for any channels keeps to few.
Priced priced(const Problem& p, Type type, int tile, const Device& device) {
  const bool any = tile == kAnyTile;
  Priced best{{tile, 1}, cost(p, type, {tile, 1}, device)};
  const auto next = [any](int splits) {
    return any ? splits * 2 : splits < 4 ? splits + 1 : splits * 5 / 4;
  };
  for (int splits = 2; splits <= (any ? 16 : kMostSplits); splits = next(splits)) {
    const Choice choice{tile, splits};
    if (schedule(p, type, choice).splits < splits) break;
    const double clocks = cost(p, type, choice, device);
    if (clocks < best.clocks) best = {choice, clocks};
  }
  return best;
}

// Every tile that serves.
std::vector<Priced> priced(const Problem& p, Type type, const Device& device) {
  if (!in_chunks(p, type)) return {priced(p, type, kAnyTile, device)};
  std::vector<Priced> all;
  for (int tile = 0; tile < kAnyTile; ++tile)
    if (has_tile(math_of(type), tile, p.shortcut_c > 0))
      all.push_back(priced(p, type, tile, device));
  return all;
}

bool is_cheaper(const Priced& a, const Priced& b) { return a.clocks < b.clocks; }

}  // namespace

Choice choose(const Problem& p, Type type, const Device& device) {
  struct Asked {
    Problem problem;
    Type type;
    Device device;
  };
  thread_local cuda::Remembered<Asked, Choice> known;
  return known.get({p, type, device}, [&] {
    const std::vector<Priced> all = priced(p, type, device);
    return std::min_element(all.begin(), all.end(), is_cheaper)->choice;
  });
}

std::vector<Choice> ranked(const Problem& p, Type type, const Device& device) {
  std::vector<Priced> all = priced(p, type, device);
  std::stable_sort(all.begin(), all.end(), is_cheaper);
  std::vector<Choice> choices;
  for (const Priced& one : all) choices.push_back(one.choice);
  return choices;
}

std::string text(const Choice& choice) {
  return sentence("sm80 ", kTiles[choice.tile].name, " split ", choice.splits);
}
bool parse(const std::string& given, Choice* choice) {
  char name[16];
  int splits = 0, end = 0;
  if (sscanf(given.c_str(), "sm80 %15s split %d%n", name, &splits, &end) != 2) return false;
  for (int i = 0; i < kTileCount; ++i) {
    *choice = {i, splits};
    if (splits > 0 && std::string(name) == kTiles[i].name && text(*choice) == given) return true;
  }
  return false;
}

Grid grid_of(const Problem& p, Type type, const Choice& choice) {
  const Schedule s = schedule(p, type, choice);
  const Tile& t = kTiles[choice.tile].tile;
  return {tiles_of(s), s.splits, threads(t), shared_bytes(t)};
}

Workspace workspace_of(const Problem& p, Type type, const Choice& choice) {
  const Schedule s = schedule(p, type, choice);
  if (s.splits == 1) return {0, 0};
  const Tile& t = kTiles[choice.tile].tile;
  return {tiles_of(s), int64_t(tiles_of(s)) * s.splits * t.pixels * t.channels};
}

KernelParams params_of(const Problem& p, Type type, const Choice& choice, const Operands& o) {
  KernelParams k{};
  k.problem = p;
  k.schedule = schedule(p, type, choice);
  k.out_h = out_h(p);
  k.out_w = out_w(p);
  k.relu = o.relu;
  k.x = o.x;
  k.weight = o.weight;
  k.shortcut_x = o.shortcut_x;
  k.shortcut_weight = o.shortcut_weight;
  k.scale = o.scale;
  k.shift = o.shift;
  k.shortcut_scale = o.shortcut_scale;
  k.shortcut_shift = o.shortcut_shift;
  k.residual = o.residual;
  k.y = o.y;
  k.partial = o.partial;
  k.tickets = o.tickets;
  return k;
}

}  // namespace resnet_fused::sm80
