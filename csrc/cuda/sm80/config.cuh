// A tile's constants at compile time, for one type of element and way to multiply.
#pragma once

#include "cuda/sm80/ptx.cuh"

namespace resnet_fused::sm80 {

// Shape: a tile `kT`, and whether its operands come in aligned 16-byte chunks, `kVector`.
template <typename T, Math kMath_, typename Shape>
struct TileConfig {
  static constexpr Tile kT = Shape::kT;
  static constexpr Math kMath = kMath_;
  static constexpr bool kVector = Shape::kVector;
  static constexpr int kPixels = kT.pixels, kChannels = kT.channels, kStages = kT.stages;
  static constexpr int kWarpsM = kT.warps_m, kWarpsN = kT.warps_n;
  static constexpr int kThreads = threads(kT);
  static constexpr int kChunks = kT.chunks, kRowBytes = 16 * kChunks;
  static constexpr int kElements = 16 / int(sizeof(T));  // of a chunk
  static constexpr int kStep = kChunks * kElements;      // of the reduction per stage
  static constexpr int kWarpM = kPixels / kWarpsM, kWarpN = kChannels / kWarpsN;
  static constexpr int kMs = kWarpM / 16, kNs = kWarpN / 8;  // a warp's 16 x 8 products
  static constexpr int kRows = kThreads / kChunks;           // filled by one pass of the block
  static constexpr int kPixelRows = kPixels / kRows, kChannelRows = kChannels / kRows;
  static constexpr int kPixelBytes = kPixels * kRowBytes, kStageBytes = stage_bytes(kT);
  static constexpr int kPitch = patch_pitch(kT), kWord = shared_bytes(kT) - 16;
  static_assert(kChunks == 4 || kChunks == 8, "the swizzle is for rows of 64 or 128 bytes");
  static_assert(kPixels % kRows == 0 && kChannels % kRows == 0 && kRows % 8 == 0, "whole passes");
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "whole products, B in pairs");
  static_assert(32 % (kWarpN / kElements) == 0, "the epilogue's lanes keep their channels");

  // Byte offset of a chunk in a stage's operand. Eight rows at one chunk fall on all 32 banks. The
  // pattern repeats every 8 rows, and chunk ^ n lies at offset ^ (n << 4), so that one offset per
  // thread serves a whole stage.
  static RF_DEVICE uint32_t swizzle(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (kChunks == 4 ? (row >> 1) & 3 : row & 7)) << 4);
  }
};

// One of kTiles.
template <int kTile>
struct NumberedTile {
  static constexpr Tile kT = kTiles[kTile].tile;
  static constexpr bool kVector = kTile != kAnyTile;
};
template <typename T, Math kMath, int kTile>
using Config = TileConfig<T, kMath, NumberedTile<kTile>>;

// Sixteen bytes of elements.
template <typename T>
struct alignas(16) Vector {
  T v[16 / sizeof(T)];
};
struct alignas(16) Float4 {
  float v[4];
};

}  // namespace resnet_fused::sm80
