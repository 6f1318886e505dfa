// Blocks that hand their outputs on to each other, and the head behind the last, on raw pointers:
// one program for a team of threads (team.h).
#pragma once

#include <optional>
#include <vector>

#include "cpu/block.h"
#include "cpu/head.h"

namespace resnet_fused {

// x of the first block, y of the last or, if there is one, of the head; dense NHWC. x and y of the
// head's layers are left open.
struct ChainArgs {
  std::vector<const Block*> blocks;  // at least one
  std::optional<MeanArgs> mean;      // over the last block's output
  std::optional<LinearArgs> linear;  // only behind a mean
  const void* x;
  void* y;
};

void run_chain(const ChainArgs& chain);

}  // namespace resnet_fused
