// multiply_peak and read_words: what benchmarks and the doctor measure the machine with.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/peak.h"
#include "cpu/tensors.h"
#include "op/op_string.h"

namespace resnet_fused {
namespace {

double multiply_peak_op(double seconds, StringHandle dtype_name) {
  const char* op = "multiply_peak";
  const std::string dtype = take_string(dtype_name);
  check(seconds > 0 && seconds <= 60, op, ": seconds must be positive and at most 60, got ",
        seconds);
  check(dtype == "float32" || dtype == "bfloat16", op,
        ": dtype must be \"float32\" or \"bfloat16\", got \"", dtype, "\"");
  return dtype == "float32" ? multiply_peak(seconds) : multiply_peak_bf16(seconds);
}

int64_t read_words_op(const std::vector<Tensor>& tensors) {
  uint64_t result = 0;
  for (const Tensor& tensor : tensors) {
    check(tensor.is_contiguous(), "read_words: tensors must be contiguous, got shape ",
          shape_text(tensor.sizes()), " with other strides");
    result ^= read_words(tensor.const_data_ptr(),
                         tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  }
  return static_cast<int64_t>(result);
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("read_words", TORCH_BOX(&resnet_fused::read_words_op));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("multiply_peak", TORCH_BOX(&resnet_fused::multiply_peak_op));
}
