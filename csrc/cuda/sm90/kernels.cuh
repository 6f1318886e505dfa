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

template <typename T, int kN>
const void* tap_shift_kernel_of(bool shared, bool shortcut) {
  if (shared)
    return shortcut ? reinterpret_cast<const void*>(&tap_shift_kernel<T, kN, true, true>)
                    : reinterpret_cast<const void*>(&tap_shift_kernel<T, kN, true, false>);
  return shortcut ? reinterpret_cast<const void*>(&tap_shift_kernel<T, kN, false, true>)
                  : reinterpret_cast<const void*>(&tap_shift_kernel<T, kN, false, false>);
}
template <typename T>
const void* tap_shift_kernel_of(int n, bool shared, bool shortcut) {
  switch (n) {
    case 208:
      return tap_shift_kernel_of<T, 208>(shared, shortcut);
    case 216:
      return tap_shift_kernel_of<T, 216>(shared, shortcut);
    case 232:
      return tap_shift_kernel_of<T, 232>(shared, shortcut);
    case 256:
      return tap_shift_kernel_of<T, 256>(shared, shortcut);
  }
  return nullptr;
}

}  // namespace resnet_fused::sm90
