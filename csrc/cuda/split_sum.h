// Split-K: how many loads whoever adds a tile's splits keeps in flight. For the kernels, and for
// the plans, which estimate what it takes.
#pragma once

namespace resnet_fused::cuda {

// A thread's sums come in quads, 16 bytes a load. Quads and splits that are loaded at a time: 16
// loads where there is room for 64 more registers, 8 beside the larger tiles' own sums.
RF_HD constexpr int quads_at_once(int quads) { return quads < 8 ? quads : 8; }
RF_HD constexpr int splits_at_once(int quads) { return quads > 8 ? 1 : 16 / quads_at_once(quads); }

// Loads that wait for one another.
RF_HD constexpr int split_rounds(int quads, int splits) {
  return quads / quads_at_once(quads) *
         ((splits + splits_at_once(quads) - 1) / splits_at_once(quads));
}

}  // namespace resnet_fused::cuda
