// What the launches share: the runtime's errors as text, shared memory beyond 48 KiB, and what was
// captured.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "cuda/sm90/overlap.h"

namespace resnet_fused::sm90 {

std::string error(const char* what, cudaError_t code);
// Asked for once per kernel and device; bytes: the most that any launch of the kernel will need.
cudaError_t allow_shared(const void* kernel, int bytes);
Range range_of(const void* at, int64_t bytes);
// Of all kernels of this folder.
CapturedLaunches& captured_launches();

}  // namespace resnet_fused::sm90
