// The compiled instances of the kernels for one type of element.
#pragma once

#include "cuda/sm90/conv_kernel.cuh"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/tap_shift_kernel.cuh"

namespace resnet_fused::sm90 {

template <typename T, int kTile = 0>
const void* kernel_of(int tile, bool shortcut, bool split) {
  if constexpr (kTile < kTileCount) {
    if (tile != kTile) return kernel_of<T, kTile + 1>(tile, shortcut, split);
    if constexpr (splits_reduction(kTiles[kTile].tile))
      if (split)
        return shortcut ? reinterpret_cast<const void*>(&conv_kernel<T, kTile, true, true>)
                        : reinterpret_cast<const void*>(&conv_kernel<T, kTile, false, true>);
    return shortcut ? reinterpret_cast<const void*>(&conv_kernel<T, kTile, true, false>)
                    : reinterpret_cast<const void*>(&conv_kernel<T, kTile, false, false>);
  } else {
    return nullptr;
  }
}

template <typename T, int kIndex = 0>
const void* tap_shift_kernel_of(int n, bool shared, bool shortcut) {
  if constexpr (kIndex < kTapShiftNCount) {
    constexpr int kN = kTapShiftN[kIndex];
    if (n != kN) return tap_shift_kernel_of<T, kIndex + 1>(n, shared, shortcut);
    if (shared)
      return shortcut ? reinterpret_cast<const void*>(&tap_shift_kernel<T, kN, true, true>)
                      : reinterpret_cast<const void*>(&tap_shift_kernel<T, kN, true, false>);
    return shortcut ? reinterpret_cast<const void*>(&tap_shift_kernel<T, kN, false, true>)
                    : reinterpret_cast<const void*>(&tap_shift_kernel<T, kN, false, false>);
  } else {
    return nullptr;
  }
}

}  // namespace resnet_fused::sm90
