// The small ops: add_relu, content_*, cpu_*, set_cpu_isa, drop_output_memory. Schemas of all ops:
// resnet_fused/_schemas.py; fakes, autograd and autocast: resnet_fused/ops.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu/content.h"
#include "cpu/kernels.h"
#include "cpu/output_memory.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"
#include "op/op_string.h"

namespace resnet_fused {
namespace {

// ---- add_relu -----------------------------------------------------------------------------------

Tensor add_relu(const Tensor& a, const Tensor& b) {
  const char* op = "add_relu";
  const DType dtype = kernel_dtype(a, op, "a");
  check_shape(b, a.sizes(), op, "b");
  check_dtype(b, a.scalar_type(), op, "b");
  check_cpu(b, op, "b", "a");
  const int64_t numel = a.numel();
  if (numel == 0)
    return torch::stable::new_empty(a, a.sizes());  // as empty_in_format in resnet_fused/ops
  Tensor y = torch::stable::empty_like(a);          // dense, in a's order of dimensions
  const Tensor dense_a = with_layout(a, y), dense_b = with_layout(b, y);
  const AddReluArgs args{dtype, dense_a.const_data_ptr(), dense_b.const_data_ptr(),
                         y.mutable_data_ptr()};
  const Kernels& isa = kernels();
  for_each_span(numel, kSpanGrain,
                [&](int64_t begin, int64_t end) { isa.add_relu(args, begin, end); });
  return y;
}

// ---- content_*, cpu_* ---------------------------------------------------------------------------

Tensor sample_op(const std::vector<Tensor>& tensors) {
  check(!tensors.empty(), "content_sample: tensors must not be empty");
  const std::vector<char> sample = content_sample(tensors);
  Tensor result =
      torch::stable::new_empty(tensors[0], {static_cast<int64_t>(sample.size())}, ScalarType::Byte);
  std::copy(sample.begin(), sample.end(), static_cast<char*>(result.mutable_data_ptr()));
  return result;
}

bool equal_op(const std::vector<Tensor>& tensors, const Tensor& sample) {
  check_dtype(sample, ScalarType::Byte, "content_equal", "sample");
  check(sample.is_contiguous(),
        "content_equal: sample must be contiguous, as content_sample returned it");
  return content_equal(tensors, static_cast<const char*>(sample.const_data_ptr()), sample.numel());
}

int64_t hash_op(const std::vector<Tensor>& tensors) { return content_hash(tensors); }

std::string cpu_isa() { return kernels().isa; }

void set_cpu_isa(StringHandle isa) { use_isa(take_string(isa)); }

std::string features_op() { return cpu_features(); }

void drop_output_memory_op() { drop_output_memory(); }

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("add_relu", TORCH_BOX(&resnet_fused::add_relu));
  m.impl("content_sample", TORCH_BOX(&resnet_fused::sample_op));
  m.impl("content_equal", TORCH_BOX(&resnet_fused::equal_op));
  m.impl("content_hash", TORCH_BOX(&resnet_fused::hash_op));
}

// Ops without a tensor argument have no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&resnet_fused::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&resnet_fused::set_cpu_isa));
  m.impl("cpu_features", TORCH_BOX(&resnet_fused::features_op));
  m.impl("drop_output_memory", TORCH_BOX(&resnet_fused::drop_output_memory_op));
}
