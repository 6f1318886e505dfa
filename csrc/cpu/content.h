// Has a tensor been edited behind autograd's back? Comparing some of its values tells.
//
// `tensor.data.mul_(2)` and writes through numpy change a parameter without raising its version
// counter. A cache of packed weights therefore also keeps a sample of the values it was made from:
// see samples.h. (Python's guard looks at the same values at every call:
// csrc/python/snapshot.h.)
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace resnet_fused {

// The bytes of the sampled values of all tensors, one after the other.
std::vector<char> content_sample(const std::vector<torch::stable::Tensor>& tensors);

// content_sample(tensors) == sample, without allocating.
bool content_equal(const std::vector<torch::stable::Tensor>& tensors, const char* sample,
                   int64_t count);

// A hash of every value of all tensors, never negative.
int64_t content_hash(const std::vector<torch::stable::Tensor>& tensors);

}  // namespace resnet_fused
