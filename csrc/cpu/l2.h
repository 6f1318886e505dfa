// The size of one core's L2 cache, by which work is cut. sysconf is often wrong about L3.
#pragma once

#include <cstdint>

namespace resnet_fused {

int64_t l2_bytes();  // at least 512 KiB

}  // namespace resnet_fused
