// Where a stream is, for launches that may overlap what is ahead of them.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace resnet_fused::cuda {

// Node: what the next one will depend on; null where that is none or several.
struct StreamEnd {
  bool runs;         // it is not captured
  uint64_t capture;  // unique in the process
  const void* node;
};
StreamEnd end_of(CUstream_st* stream);

}  // namespace resnet_fused::cuda
