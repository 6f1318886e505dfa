// The kernel's instances, in two files because each takes nvcc a minute.
#pragma once

namespace resnet_fused::sm90 {

const void* kernel_bfloat16(int tile, bool shortcut, bool split);
const void* kernel_float16(int tile, bool shortcut, bool split);

}  // namespace resnet_fused::sm90
