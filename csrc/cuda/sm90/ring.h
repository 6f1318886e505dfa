// The phases of the mbarriers that hand shared-memory stages between producer and consumers.
//
// A barrier completes phase 0, 1, 2, ...; a wait names only the parity of the phase, so it is
// unambiguous no further than one lap of the ring ahead. Two warpgroups that take turns (ping-pong)
// could be two laps apart, and would then read stages of the wrong tile; the turn barriers keep
// them in order.
#pragma once

#include <cstdint>

#include "cuda/host_device.h"

namespace resnet_fused::sm90 {

struct Ring {
  uint32_t stage, phase;
};
RF_HD Ring ring_at(uint32_t iteration, uint32_t stages) {
  return {iteration % stages, (iteration / stages) & 1u};
}
RF_HD void ring_next(Ring& ring, uint32_t stages) {
  if (++ring.stage == stages) {
    ring.stage = 0;
    ring.phase ^= 1u;
  }
}
RF_HD uint32_t full_parity(const Ring& ring) { return ring.phase; }
// On a fresh barrier a wait for parity 1 returns at once: the first lap finds every stage empty.
RF_HD uint32_t empty_parity(const Ring& ring) { return ring.phase ^ 1u; }
// The turn barrier of the warpgroup that owns the block's tile number i > 0: its completion number
// (i - 1) / 2 says that tile i - 1 has seen its last stage.
RF_HD uint32_t turn_parity(int i) { return uint32_t((i - 1) >> 1) & 1u; }

}  // namespace resnet_fused::sm90
