// What an op needs of the device it runs on.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/sm80/plan.h"
#ifndef RESNET_FUSED_WITHOUT_SM90
#include "cuda/sm90/plan.h"
#endif

struct CUstream_st;

namespace resnet_fused::cuda {

struct DeviceFacts {
  int multiprocessors, shared_bytes;  // of one multiprocessor
  int major, minor;                   // compute capability
  int largest_cluster;                // blocks, of a split in sm90/; 1 elsewhere
};
// Asked of the driver once per device. Throws where it does not answer.
const DeviceFacts& device_facts(int device);

// What of them the kernels are chosen by.
inline sm80::Device sm80_device(const DeviceFacts& facts) {
  return {facts.multiprocessors, facts.shared_bytes};
}
#ifndef RESNET_FUSED_WITHOUT_SM90
inline sm90::Device sm90_device(const DeviceFacts& facts) {
  return {facts.multiprocessors, facts.largest_cluster};
}
#endif

// PyTorch's current stream of a device.
CUstream_st* current_stream(int device);

// Sets words to zero, in order with the stream's kernels. Empty, or why it did not start.
std::string clear(uint32_t* words, int64_t count, CUstream_st* stream);

// Whether all that is ever launched by a stream's handle runs in one order. Not what a graph that
// is captured will run, nor cudaStreamPerThread, which is another stream in each thread.
bool runs_in_order(CUstream_st* stream);

// Words that will be zero in the stream, never freed, and not the caching allocator's, whose pools
// may be a graph's. Null where there is no memory.
uint32_t* new_zeros(int64_t count, CUstream_st* stream);

}  // namespace resnet_fused::cuda
