// A tile's constants at compile time.
#pragma once

#include "cuda/sm90/params.h"
#include "cuda/sm90/ptx.cuh"

namespace resnet_fused::sm90 {

// Shared memory: `kStages` stages of operands (A, then B), aligned to the largest swizzle atom of
// 1024 bytes; the places of two warpgroups' outputs; a full and an empty barrier per stage, two
// turn barriers, and two of residuals.
template <int kTile>
struct Config {
  static constexpr Tile kT = kTiles[kTile].tile;
  static constexpr bool kChannelsOnM = kT.channels_on_m;
  static constexpr bool kPingPong = kT.sharing == sm90::kPingPong && kT.consumers == 2;
  static constexpr bool kShared = kT.sharing == kSplitM;
  static constexpr int kMBlocks = kT.m_blocks, kN = kT.n, kChunk = kT.chunk, kStages = kT.stages;
  static constexpr int kTileM = tile_m(kT), kTilePixels = tile_pixels(kT),
                       kTileChannels = tile_channels(kT);
  static constexpr int kSpan = 2 * kChunk;  // bytes of an operand's row
  static constexpr int kBytesA = kTileM * kSpan, kStageBytes = stage_bytes(kT);
  static constexpr int kConsumers = kT.consumers, kThreads = 128 * (1 + kConsumers);
  static constexpr int kBlocksPerSm = kConsumers == 1 ? 2 : 1;
  static constexpr int kTeam = kShared ? 256 : 128;               // threads that sum one tile
  static constexpr int kEmptyArrivals = kTeam / 32;               // one per warp
  static constexpr int kWeightRows = kChannelsOnM ? 0 : kBytesA;  // where they begin in a stage
  static constexpr int kPixelRows = kChannelsOnM ? kBytesA : 0;
  static constexpr bool kStaged = stages_outputs(kT);
  static constexpr int kPlaces = kStages * kStageBytes, kPlaceBytes = place_bytes(kT);
  static constexpr int kBarriers = kPlaces + 2 * kPlaceBytes;
  static constexpr int kSharedBytes = shared_bytes(kT);
  static_assert(kChunk == 64 || kChunk == 32 || kChunk == 16, "the swizzle modes of 128, 64, 32");
  static_assert(kTileChannels <= 256 && kTilePixels <= 256, "one copy of each operand a stage");
  static_assert(kConsumers == 2 || !kShared, "two warpgroups to share a tile");
  static_assert(kBytesA % 1024 == 0 && kStageBytes % 1024 == 0, "swizzle atoms stay aligned");
  static_assert(kN % 32 == 0, "the epilogue's groups");
  static_assert(kStaged || !kChannelsOnM, "store_at_once has pixels on M");
  static_assert(!kStaged || kChannelsOnM || kN % 64 == 0, "places are groups of 64 channels");
  static_assert(kPlaces % 1024 == 0 && kPlaceBytes % 1024 == 0, "and swizzle atoms");
  static_assert(!kStaged || !splits_reduction(kT), "a cluster's block has one tile");
  static_assert(kStages >= 2, "a stage is released one step late");
  static_assert(1024 + kBarriers + 16 * kStages + 32 <= kSharedBytes && kSharedBytes <= kMostShared,
                "shared memory");
};

}  // namespace resnet_fused::sm90
