// The compiled instances of the kernel for one type of element, by tile, shortcut and split-K.
#pragma once

#include "cuda/sm90/conv_kernel.cuh"
#include "cuda/sm90/kernels.h"

namespace resnet_fused::sm90 {

template <typename T, int kTile = 0>
const void* kernel_of(int tile, bool shortcut, bool split) {
  if constexpr (kTile < kTileCount) {
    if (tile != kTile) return kernel_of<T, kTile + 1>(tile, shortcut, split);
    if (shortcut)
      return split ? reinterpret_cast<const void*>(&conv_kernel<T, kTile, true, true>)
                   : reinterpret_cast<const void*>(&conv_kernel<T, kTile, true, false>);
    return split ? reinterpret_cast<const void*>(&conv_kernel<T, kTile, false, true>)
                 : reinterpret_cast<const void*>(&conv_kernel<T, kTile, false, false>);
  } else {
    return nullptr;
  }
}

}  // namespace resnet_fused::sm90
