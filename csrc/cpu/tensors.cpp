#include "cpu/tensors.h"

#include <algorithm>

#include "cpu/output_memory.h"

namespace resnet_fused {
namespace {

// Whether an output of so many elements gets memory of ours, and then its bytes. Sizes beyond any
// memory are for PyTorch's allocator to refuse.
bool has_own_memory(const int64_t (&sizes)[4], size_t element, int64_t& bytes) {
  bytes = static_cast<int64_t>(element);
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) return false;
  }
  return kOwnMemory && bytes >= kLeastKept && bytes < int64_t{1} << 60;
}

}  // namespace

Tensor empty_nhwc(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const auto step = [](int64_t size) { return std::max<int64_t>(size, 1); };
  const int64_t sizes[] = {n, c, h, w};
  const int64_t strides[] = {step(h) * step(w) * step(c), 1, step(w) * step(c), step(c)};
  const int32_t cpu = aoti_torch_device_type_cpu();
  int32_t dtype = 0;
  int64_t bytes = 0;
  AtenTensorHandle handle = nullptr;
  // Not through the dispatcher, whose three ops for this would cost 4 us.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  if (!has_own_memory(sizes, like.element_size(), bytes)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, dtype, cpu, 0, &handle));
    return Tensor(handle);
  }
  void* const block = take_output_memory(bytes);
  const auto give_back = [](void* address, void* size) {
    give_back_output_memory(address, static_cast<int64_t>(reinterpret_cast<intptr_t>(size)));
  };
  const auto error = torch_from_blob(block, 4, sizes, strides, 0, dtype, cpu, -1, &handle,
                                     aoti_torch_layout_strided(), nullptr, 0, give_back,
                                     reinterpret_cast<void*>(static_cast<intptr_t>(bytes)));
  if (error != AOTI_TORCH_SUCCESS) give_back_output_memory(block, bytes);
  TORCH_ERROR_CODE_CHECK(error);
  return Tensor(handle);
}

}  // namespace resnet_fused
