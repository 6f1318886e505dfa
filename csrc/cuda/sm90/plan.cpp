#include "cuda/sm90/plan.h"

#include <algorithm>
#include <cstdio>
#include <sstream>

#include "cuda/sm90/tap_shift.h"
#include "cuda/split_sum.h"

namespace resnet_fused::sm90 {
namespace {

template <typename... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Rates of an H100 or H200 (SXM). Two are measured on such machines, by large matrix products and
// copies: 790 TFLOP/s of 16-bit products are 132 SMs of 4096 FLOP a clock at 1.46 GHz under that
// load, and 3.0 (H100) to 4.3 (H200) TB/s of memory. What L2 delivers to shared memory is assumed,
// and decides most choices: the first thing to measure on a GPU.
constexpr double kGhz = 1.46, kMacsPerClock = 2048, kSharedBytesPerClock = 128;
constexpr double kL2BytesPerClock = 36, kMemoryTBs = 3.0;
// Clocks of latency: of one step of the reduction at least, of a tile's first load, of a split-K
// hand-over (sums out, fences, ticket), of each round of loads that adds the splits up; and of a
// launch. Assumed too.
constexpr double kStepClocks = 130, kFirstLoadClocks = 700, kSplitClocks = 1200,
                 kSplitRoundClocks = 300, kLaunchUs = 2.0;

int chunk_for(int c) { return c > 32 ? 64 : c > 16 ? 32 : 16; }
int slots(const Tile& t, const Device& d) { return d.multiprocessors * (t.consumers == 1 ? 2 : 1); }

}  // namespace

std::string refuses(const Problem& p) {
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

std::string refuses(const Problem& p, const Choice& choice) {
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

// The busiest SM's clocks: the slowest of its units per step, times its steps; latencies; the part
// of the epilogue that nothing hides.
Cost cost(const Problem& p, const Choice& choice, const Device& device) {
  const Tile& t = kTiles[choice.tile].tile;
  const Schedule s = schedule_of(p, t, choice.splits);
  const int work = work_items(s), m = tile_m(t);
  const double products = double(m) * t.n * t.chunk / kMacsPerClock;
  const double operand_reads = double(m / 64) * (t.chunk / 16) * (64 + t.n) * 32;
  const double shared = (operand_reads + stage_bytes(t)) / kSharedBytesPerClock;
  const double l2 = stage_bytes(t) / kL2BytesPerClock;
  Cost c{0, blocks(p, choice, device), "products"};
  double step = products;
  if (shared > step) step = shared, c.bound = "shared memory";
  if (l2 > step) step = l2, c.bound = "L2";
  const double steps = double(s.steps) / s.splits;
  double clocks = ceil_div(work, device.multiprocessors) * steps * step;
  const double latency = ceil_div(work, slots(t, device)) * steps * kStepClocks;
  if (latency > clocks) clocks = latency, c.bound = "latency";
  clocks += double(m) * t.n * (t.sharing == kSplitM ? 0.12 : 0.06) + kFirstLoadClocks;
  if (s.splits > 1)
    clocks += kSplitClocks + kSplitRoundClocks * cuda::split_rounds(t.m_blocks * t.n / 8, s.splits);
  c.microseconds = clocks / (kGhz * 1e3);
  const double bytes =
      2. * (double(p.n) * p.h * p.w * p.c + double(p.k) * p.r * p.s * p.c + 2. * s.pixels * p.k +
            double(p.shortcut_c) * (p.k + double(p.n) * p.shortcut_h * p.shortcut_w));
  if (bytes / (kMemoryTBs * 1e6) > c.microseconds && bytes > 40e6)
    c.microseconds = bytes / (kMemoryTBs * 1e6), c.bound = "memory";
  c.microseconds += kLaunchUs;
  return c;
}

namespace {

struct Priced {
  Choice choice;
  double microseconds;
};

// Every tile whose chunk suits the channels, with the number of splits that costs least.
std::vector<Priced> priced(const Problem& p, const Device& device) {
  std::vector<Priced> all;
  for (int i = 0; i < kTileCount; ++i) {
    const Tile& t = kTiles[i].tile;
    if (t.chunk != chunk_for(p.c)) continue;
    Priced best{{i, 1}, cost(p, {i, 1}, device).microseconds};
    for (int splits : {2, 4, 8}) {
      if (!splits_reduction(t)) break;
      const Schedule s = schedule_of(p, t, splits);
      if (s.splits != splits || int64_t(tiles_of(s)) * (splits - 1) >= slots(t, device)) break;
      const double us = cost(p, {i, splits}, device).microseconds;
      if (us < best.microseconds) best = {{i, splits}, us};
    }
    all.push_back(best);
  }
  return all;
}

bool is_cheaper(const Priced& a, const Priced& b) { return a.microseconds < b.microseconds; }

}  // namespace

Choice choose(const Problem& p, const Device& device) {
  const std::vector<Priced> all = priced(p, device);
  return std::min_element(all.begin(), all.end(), is_cheaper)->choice;
}

std::vector<Choice> ranked(const Problem& p, const Device& device) {
  std::vector<Priced> all = priced(p, device);
  std::stable_sort(all.begin(), all.end(), is_cheaper);
  std::vector<Choice> choices;
  if (tap_shift_refuses(p).empty()) choices.push_back({kTapShift, 1});
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
