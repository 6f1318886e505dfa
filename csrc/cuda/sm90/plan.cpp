#include "cuda/sm90/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "check.h"
#include "cuda/remembered.h"
#include "cuda/sm90/tap_shift.h"

namespace resnet_fused::sm90 {
namespace {

// Fitted to what an H100 (SXM) took for the convolutions of ResNet-18 and 50 in bfloat16 at batch 1
// to 128 (tests/sm90_times.txt): the ratios to measured times without a residual have a standard
// deviation of 11%, and choices cost a net up to 1% more than the best, residuals included. Read
// elsewhere: the clock (ncu, in these kernels; 1.46 under large matrix products), memory (the data
// sheet). Assumed: that other cards differ in the number of SMs alone.
constexpr double kGhz = 1.755, kMemoryTBs = 3.35, kMacsPerClock = 2020;
// Bytes a clock that L2 brings to an SM: where all load, and at most where few do. All stages but
// one are on their way, and where all load that takes so many clocks: three of 48 KB are too few.
constexpr double kL2BytesPerClock = 44, kL2BytesAlone = 76, kLoadClocks = 2800;
// Clocks of a step of the reduction at least, for each row of the operands.
constexpr double kRowClocks = 1.3;
// Clocks of an epilogue for each sum of a warpgroup: by way of shared memory, with channels or with
// pixels on M; in registers, with what such an epilogue takes besides.
constexpr double kChannelSumClocks = 0.26, kPixelSumClocks = 0.44, kRegisterSumClocks = 0.225,
                 kRegisterClocks = 1050;
// What two warpgroups that take turns need of the time of one; 0.5 would be if they never met.
constexpr double kTurns = 0.56;
// Clocks that a window of 64 channels takes at least.
constexpr double kWindowClocks = 1450;
constexpr double kLaunchUs = 1.8;
// Clocks that clusters take, for each of the convolution's blocks and each sum of a block. Far more
// where not all blocks are resident.
constexpr double kSplitBlockClocks = 16, kSplitSumClocks = 0.68;

int chunk_for(int c) { return c > 32 ? 64 : c > 16 ? 32 : 16; }
int slots(const Tile& t, const Device& d) { return d.multiprocessors * (t.consumers == 1 ? 2 : 1); }

}  // namespace

std::string refuses(const Problem& p) {
  if (p.groups != 1) return "its kernel has no groups";
  if (p.n < 1 || p.h < 1 || p.w < 1 || p.c < 1 || p.k < 1) return "the tensor is empty";
  if (p.c % 8 || p.shortcut_c % 8)
    return sentence("TMA needs input channels in multiples of 8, not ",
                    p.c % 8 ? p.c : p.shortcut_c);
  if (p.k % 8) return sentence("16-byte stores need output channels in multiples of 8, not ", p.k);
  const int strides[] = {p.stride_h, p.stride_w, p.shortcut_c ? p.shortcut_stride_h : 1,
                         p.shortcut_c ? p.shortcut_stride_w : 1};
  for (int s : strides)
    if (s > 8) return sentence("TMA walks in strides up to 8, not ", s);
  const int reach_h = p.dilation_h * (p.r - 1), reach_w = p.dilation_w * (p.s - 1);
  for (int reach : {reach_h, reach_w})
    if (reach > 255) return sentence("TMA's tap offsets reach 255 pixels, not ", reach);
  for (int pad : {p.pad_h, p.pad_w})
    if (pad > 127) return sentence("TMA's corners allow a padding up to 127, not ", pad);
  for (int corner : {p.pad_h - reach_h, p.pad_w - reach_w})
    if (corner < -128)
      return sentence(
          "TMA's corners allow a reach of 128 pixels beyond the padding, "
          "not ",
          -corner);
  if (out_h(p) < 1 || out_w(p) < 1) return "the output is empty";
  if (int64_t(p.n) * out_h(p) * out_w(p) > 0x7fffffffLL - 1024)
    return "there are more than 2^31 output pixels";
  if (p.shortcut_c && ((p.shortcut_h - 1) / p.shortcut_stride_h + 1 != out_h(p) ||
                       (p.shortcut_w - 1) / p.shortcut_stride_w + 1 != out_w(p)))
    return "the shortcut's size differs from the output's";
  return "";
}

std::string refuses(const Problem& p, const Choice& choice, const Device& device) {
  if (choice.tile == kTapShift)
    return choice.splits == 1 ? tap_shift_refuses(p) : "tap-shift does not split the reduction";
  const std::string why = refuses(p);
  if (!why.empty()) return why;
  if (choice.tile < 0 || choice.tile >= kTileCount) return "there is no such tile";
  const NamedTile& named = kTiles[choice.tile];
  const Schedule s = schedule_of(p, named.tile, choice.splits);
  if (choice.splits != 1 && !splits_reduction(named.tile))
    return sentence("the tile ", named.name, " does not split the reduction");
  if (choice.splits != 1 && choice.splits != 2 && choice.splits != 4 && choice.splits != 8)
    return sentence("a cluster has 2, 4 or 8 splits, not ", choice.splits);
  if (choice.splits != 1 && choice.splits > device.largest_cluster)
    return sentence("a cluster of ", choice.splits,
                    " blocks does not fit this device: its limit is ", device.largest_cluster);
  if (choice.splits > s.steps)
    return sentence("the reduction has ", s.steps, " steps to split, not ", choice.splits);
  if (int64_t(tiles_of(s)) * s.splits > 0x7fffffffLL) return "there are more than 2^31 work items";
  return "";
}

int blocks(const Problem& p, const Choice& choice, const Device& device) {
  if (choice.tile == kTapShift) {
    const int tiles = window_tiles(tap_shift_window(p), p.n);
    return std::min(tiles * ceil_div(p.k, tap_shift_stages(p.k > 64).channels),
                    device.multiprocessors);
  }
  const Tile& t = kTiles[choice.tile].tile;
  const int work = work_items(schedule_of(p, t, choice.splits));
  return choice.splits > 1 ? work : std::min(work, slots(t, device));  // a cluster has one tile
}

namespace {

// What a tile asks of its SM.
struct Demand {
  int tiles;                 // of the convolution, each of its parts for itself
  double products, bytes;    // clocks of the tensor cores; from L2
  double in_flight;          // bytes, of the SM
  double latency, epilogue;  // clocks: of its steps at least, and behind them
  int blocks_per_sm;
  bool turns;  // the next tile's steps run under the epilogue
};

// The busiest SM's clocks.
double clocks_of(const Demand& t, const Device& device) {
  const int sms = device.multiprocessors, full = t.tiles / sms, rest = t.tiles % sms;
  const auto steps = [&](int loading) {
    const double all = std::min(kL2BytesPerClock, t.in_flight / kLoadClocks);
    return std::max(t.products, t.bytes / std::min(kL2BytesAlone, all * sms / loading));
  };
  const double busy = steps(sms), last = rest ? steps(rest) : 0, first = full ? busy : last;
  if (t.blocks_per_sm > 1)
    return std::max(full * busy + last + t.epilogue, ceil_div(t.tiles, sms * t.blocks_per_sm) *
                                                         (std::max(first, t.latency) + t.epilogue));
  const auto tile = [&](double clocks) {
    clocks = std::max(clocks, t.latency);
    return t.turns ? std::max(clocks, (clocks + t.epilogue) * kTurns) : clocks + t.epilogue;
  };
  return full * tile(busy) + (rest ? tile(last) : 0) +
         (t.turns ? std::max(first, t.latency) - tile(first) + t.epilogue : 0);
}

// Of a warpgroup's tile.
double sums_of(const Problem& p, const Tile& t, const Schedule& s) {
  return 64. * t.m_blocks * std::min(t.n, t.channels_on_m ? s.pixels : p.k);
}

Demand demand_of(const Problem& p, const Tile& t, const Schedule& s) {
  const double steps = double(s.steps) / s.splits, m = tile_m(t), sums = sums_of(p, t, s);
  const int blocks = t.consumers == 1 ? 2 : 1;
  // Rows of weights that are not there cost twice what others do.
  const double missing = tile_channels(t) - double(p.k) / s.channel_tiles;
  return {work_items(s),
          steps * m * t.n * t.chunk / kMacsPerClock,
          steps * t.chunk * 2 * (m + t.n + missing),
          double(blocks) * (t.stages - 1) * stage_bytes(t),
          steps * kRowClocks * (m + t.n),
          t.consumers == 1 ? kRegisterClocks + kRegisterSumClocks * sums
                           : (t.channels_on_m ? kChannelSumClocks : kPixelSumClocks) * sums,
          blocks,
          t.sharing == kPingPong};
}

// Tap-shift loads a window for all taps of 64 channels, and a shortcut's for one.
Demand tap_shift_demand(const Problem& p) {
  const Window g = tap_shift_window(p);
  const bool shared = p.k > 64;
  const TapShiftStages stages = tap_shift_stages(shared);
  const int channels = stages.channels;
  const int windows = (p.c + p.shortcut_c) / 64, taps = p.c / 64 * p.r * p.s + p.shortcut_c / 64;
  return {window_tiles(g, p.n) * ceil_div(p.k, channels),
          double(taps) * channels * g.n * 64 / kMacsPerClock,
          128. * (double(windows) * g.box_positions + double(taps) * channels),
          128. * (stages.windows * g.box_positions + (stages.weights - 1) * channels),
          windows * kWindowClocks,
          kChannelSumClocks * 64 * g.n,
          1,
          !shared};
}

// Every tensor once, but no residual: which convolution adds one is not known here. Of a strided
// 1x1's input the rows between are not read, nor columns of 256 bytes or more.
double memory_bytes(const Problem& p) {
  const double pixels = double(p.n) * out_h(p) * out_w(p);
  const auto input = [&](int h, int w, int c, int stride_h, int stride_w) {
    const int rows = ceil_div(h, stride_h), columns = c < 128 ? w : ceil_div(w, stride_w);
    return double(p.n) * rows * columns * c;
  };
  return 2 * (input(p.h, p.w, p.c, p.r == 1 ? p.stride_h : 1, p.s == 1 ? p.stride_w : 1) +
              double(p.k) * (p.r * p.s * p.c + p.shortcut_c) + pixels * p.k +
              (p.shortcut_c ? input(p.shortcut_h, p.shortcut_w, p.shortcut_c, p.shortcut_stride_h,
                                    p.shortcut_stride_w)
                            : 0));
}

}  // namespace

// What the busiest SM takes and what memory takes hide each other in part.
Cost cost(const Problem& p, const Choice& choice, const Device& device) {
  double clocks;
  if (choice.tile == kTapShift) {
    clocks = clocks_of(tap_shift_demand(p), device);
  } else {
    const Tile& t = kTiles[choice.tile].tile;
    const Schedule s = schedule_of(p, t, choice.splits);
    clocks = clocks_of(demand_of(p, t, s), device);
    if (s.splits > 1)
      clocks += kSplitBlockClocks * work_items(s) + kSplitSumClocks * sums_of(p, t, s);
  }
  return {std::hypot(clocks / (kGhz * 1e3), memory_bytes(p) / (kMemoryTBs * 1e6)) + kLaunchUs,
          blocks(p, choice, device)};
}

namespace {

struct Priced {
  Choice choice;
  double microseconds;
};

// Tap-shift where it serves, and every tile whose chunk suits the channels, with the number of
// splits that costs least.
std::vector<Priced> priced(const Problem& p, const Device& device) {
  std::vector<Priced> all;
  for (int i = 0; i < kTileCount; ++i) {
    const Tile& t = kTiles[i].tile;
    if (t.chunk != chunk_for(p.c)) continue;
    Priced best{{i, 1}, cost(p, {i, 1}, device).microseconds};
    for (int splits : {2, 4, 8}) {
      if (!splits_reduction(t) || splits > device.largest_cluster) break;
      const Schedule s = schedule_of(p, t, splits);
      if (s.splits != splits || int64_t(work_items(s)) > device.multiprocessors) break;
      const double us = cost(p, {i, splits}, device).microseconds;
      if (us < best.microseconds) best = {{i, splits}, us};
    }
    all.push_back(best);
  }
  if (tap_shift_refuses(p).empty())
    all.push_back({{kTapShift, 1}, cost(p, {kTapShift, 1}, device).microseconds});
  return all;
}

bool is_cheaper(const Priced& a, const Priced& b) { return a.microseconds < b.microseconds; }

}  // namespace

Choice choose(const Problem& p, const Device& device) {
  struct Asked {
    Problem problem;
    Device device;
  };
  thread_local cuda::Remembered<Asked, Choice> known;
  return known.get({p, device}, [&] {
    const std::vector<Priced> all = priced(p, device);
    return std::min_element(all.begin(), all.end(), is_cheaper)->choice;
  });
}

std::vector<Choice> ranked(const Problem& p, const Device& device) {
  std::vector<Priced> all = priced(p, device);
  std::stable_sort(all.begin(), all.end(), is_cheaper);
  std::vector<Choice> choices;
  for (const Priced& one : all) choices.push_back(one.choice);
  return choices;
}

std::string text(const Choice& choice) {
  const char* const name = choice.tile == kTapShift ? "tap-shift" : kTiles[choice.tile].name;
  return sentence("sm90 ", name, " split ", choice.splits);
}
bool parse(const std::string& text, Choice* choice) {
  char name[32];
  int splits, read = -1;
  if (sscanf(text.c_str(), "sm90 %31s split %d%n", name, &splits, &read) != 2) return false;
  if (read != int(text.size()) || splits < 1) return false;
  for (int i = 0; i <= kTapShift; ++i)
    if (std::string(name) == (i == kTapShift ? "tap-shift" : kTiles[i].name)) {
      *choice = {i, splits};
      return true;
    }
  return false;
}

}  // namespace resnet_fused::sm90
