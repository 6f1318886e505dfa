// The tiles that are compiled.
//
// 128-byte rows (chunk 64) where there are 64 channels or more. What the choice between them
// weighs is in plan.cpp, fitted to times of an H100. There each of chunk 64 was best for some
// convolution of ResNet-18 or 50, but p128x256 and p128x64.
#pragma once

#include "cuda/sm90/schedule.h"

namespace resnet_fused::sm90 {

struct NamedTile {
  const char* name;
  Tile tile;
};
// channels on M, blocks of M, N, chunk, stages, sharing, consumers
constexpr NamedTile kTiles[] = {
    {"c128x256", {true, 1, 256, 64, 3, kSplitM, 2}},   // 128 channels by 256 pixels
    {"c128x192", {true, 1, 192, 64, 4, kSplitM, 2}},   // mostly the best of the large: four stages
    {"p128x256", {false, 1, 256, 64, 3, kSplitM, 2}},  // 128 pixels by 256 channels
    {"c64x256", {true, 1, 256, 64, 4, kPingPong, 2}},
    {"p128x128", {false, 2, 128, 64, 5, kPingPong, 2}},
    {"p128x64", {false, 2, 64, 64, 8, kPingPong, 2}},
    {"p64x128", {false, 1, 128, 64, 4, kPingPong, 1}},
    {"p64x64", {false, 1, 64, 64, 6, kPingPong, 1}},
    {"p64x32", {false, 1, 32, 64, 8, kPingPong, 1}},
    {"p128x64k32", {false, 2, 64, 32, 8, kPingPong, 2}},  // C up to 32
    {"p128x64k16", {false, 2, 64, 16, 8, kPingPong, 2}},  // C up to 16
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

constexpr int kMostShared = 227 << 10;  // bytes, of a block; documented for 9.0
// Room to align the stages, the stages, outputs on their way, and barriers: two for each stage, and
// for each warpgroup one for its turn and one for its residual.
RF_HD constexpr int shared_bytes(const Tile& t) {
  return 1024 + t.stages * stage_bytes(t) + 2 * place_bytes(t) +
         (16 * t.stages + 32 + 63) / 64 * 64;
}

}  // namespace resnet_fused::sm90
