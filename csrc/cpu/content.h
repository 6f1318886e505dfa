// Has a tensor been edited behind autograd's back? Comparing some of its values tells.
//
// `tensor.data.mul_(2)` and writes through numpy change a parameter without raising its version
// counter. A cache of packed weights therefore also keeps a sample of the values it was made from:
// every value of vectors (batch norm's four, biases), kSamples spread over larger tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace resnet_fused {

constexpr int64_t kSamples = 64;

// The bytes of the sampled values of all tensors, one after the other.
std::vector<char> content_sample(const std::vector<torch::stable::Tensor>& tensors);

// content_sample(tensors) == sample, without allocating.
bool content_equal(const std::vector<torch::stable::Tensor>& tensors, const char* sample,
                   int64_t count);

// content_equal again and again for the same tensors, quickly: where the samples lie is remembered.
// Holds no reference to a tensor, which would keep torch.utils.swap_tensors from its work.
class ContentWatch {
 public:
  explicit ContentWatch(const std::vector<torch::stable::Tensor>& tensors);

  // Starts loading what `holds` looks at: most of it is in no cache, and its pages' addresses
  // neither.
  void prefetch() const;

  // Whether these tensors lie where the watched ones did, with the samples that they had.
  bool holds(const std::vector<torch::stable::Tensor>& tensors) const;

 private:
  struct Run {
    const char* address;
    size_t bytes;
  };
  std::vector<int64_t> layout_;  // of all tensors: address, dtype, sizes, strides
  std::vector<Run> runs_;
  std::vector<char> sample_;
};

// A 64-bit hash of every value of all tensors.
int64_t content_hash(const std::vector<torch::stable::Tensor>& tensors);

}  // namespace resnet_fused
