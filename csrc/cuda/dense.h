// Tensors as the kernels take them: dense, NHWC, aligned; copies where they are not.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "op/tensors.h"

namespace resnet_fused::cuda {

using Sizes = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

// (N, C, H, W) of canonical channels_last strides, as the fakes build theirs.
inline Tensor empty_nhwc(const Tensor& like, const Sizes& sizes) {
  const auto step = [&](int i) { return std::max<int64_t>(sizes[i], 1); };
  const int64_t strides[] = {step(2) * step(3) * step(1), 1, step(3) * step(1), step(1)};
  int32_t dtype = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides, dtype,
                                                  aoti_torch_device_type_cuda(),
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

// Dense NHWC at a multiple of 16 bytes, which a slice of another tensor need not be.
inline Tensor dense_image(const Tensor& tensor) {
  const Tensor image = tensor.dim() == 4 ? tensor : torch::stable::unsqueeze(tensor, 0);
  if (is_nhwc(image) && is_aligned(image)) return image;
  Tensor copy = empty_nhwc(image, sizes_of(image));
  torch::stable::copy_(copy, image);
  return copy;
}
inline std::optional<Tensor> dense_image(const MaybeTensor& tensor) {
  return tensor ? std::optional<Tensor>(dense_image(*tensor)) : std::nullopt;
}
inline Tensor dense_vector(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
inline std::optional<Tensor> dense_vector(const MaybeTensor& tensor) {
  return tensor ? std::optional<Tensor>(dense_vector(*tensor)) : std::nullopt;
}
inline const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}
inline const float* floats(const std::optional<Tensor>& tensor) {
  return static_cast<const float*>(pointer(tensor));
}

}  // namespace resnet_fused::cuda
