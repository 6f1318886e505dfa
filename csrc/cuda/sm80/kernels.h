// The kernels' addresses, for the launcher; each function is in a file of its own, compiled alone.
#pragma once

namespace resnet_fused::sm80 {

// Null where no kernel was compiled for this tile.
const void* kernel_bfloat16(int tile, bool shortcut);
const void* kernel_float16(int tile, bool shortcut);
const void* kernel_tf32(int tile, bool shortcut);
const void* kernel_float32(int tile, bool shortcut);
const void* add_relu_bfloat16();
const void* add_relu_float16();
const void* add_relu_float32();

}  // namespace resnet_fused::sm80
