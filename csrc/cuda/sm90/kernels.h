// The kernel's instances, in two files because each takes nvcc a minute.
#pragma once

namespace resnet_fused::sm90 {

const void* kernel_bfloat16(int tile, bool shortcut, bool split);
const void* kernel_float16(int tile, bool shortcut, bool split);
const void* tap_shift_bfloat16(int n, bool shared, bool shortcut);
const void* tap_shift_float16(int n, bool shared, bool shortcut);

}  // namespace resnet_fused::sm90
