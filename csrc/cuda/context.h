// What an op needs of the device it runs on.
#pragma once

#include <cstdint>
#include <string>

struct CUstream_st;

namespace resnet_fused::cuda {

struct DeviceFacts {
  int multiprocessors, shared_bytes;  // of one multiprocessor
  int major, minor;                   // compute capability
};
// Asked of the driver once per device. Throws where it does not answer.
const DeviceFacts& device_facts(int device);

// PyTorch's current stream of a device.
CUstream_st* current_stream(int device);

// Sets words to zero, in order with the stream's kernels. Empty, or why it did not start.
std::string clear(uint32_t* words, int64_t count, CUstream_st* stream);

}  // namespace resnet_fused::cuda
