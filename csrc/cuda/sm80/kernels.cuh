// The compiled instances of the kernel for one type of element and way to multiply.
#pragma once

#include "cuda/sm80/conv_kernel.cuh"

namespace resnet_fused::sm80 {

using Kernel = void (*)(KernelParams);

// Null where there is no such instance. kTiles_: those that are compiled, bit by bit.
template <typename T, Math kMath, unsigned kTiles_ = ~0u, int kTile = 0>
Kernel kernel_of(int tile, bool shortcut) {
  if constexpr (kTile < kTileCount) {
    if constexpr (has_tile(kMath, kTile, false) && (kTiles_ >> kTile & 1))
      if (tile == kTile && !shortcut) return &conv_kernel<T, kMath, kTile, false>;
    if constexpr (has_tile(kMath, kTile, true) && (kTiles_ >> kTile & 1))
      if (tile == kTile && shortcut) return &conv_kernel<T, kMath, kTile, true>;
    return kernel_of<T, kMath, kTiles_, kTile + 1>(tile, shortcut);
  } else {
    return nullptr;
  }
}

}  // namespace resnet_fused::sm80
