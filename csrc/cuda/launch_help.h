// What the launches share: the runtime's errors as text, and shared memory beyond 48 KiB.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

namespace resnet_fused::cuda {

// Takes the error back from the runtime, where the next caller would find it.
std::string error(const char* what, cudaError_t code);
// Asked for once per kernel and device; bytes: the most that any launch of the kernel will need.
cudaError_t allow_shared(const void* kernel, int bytes);

}  // namespace resnet_fused::cuda
