// The ops that this library implements on the CPU: argument checks, layouts, then raw pointers.
//
// Schemas, fakes, autograd and autocast live in resnet_fused/ops.py.
#include <torch/csrc/stable/library.h>

#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/arena.h"
#include "cpu/content.h"
#include "cpu/conv_jobs.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/peak.h"
#include "cpu/plan.h"
#include "cpu/tensors.h"

namespace resnet_fused {
namespace {

using IntPair = std::vector<int64_t>;

constexpr int64_t kSpanGrain =
    16384;  // elements: below this a second thread costs more than it brings

// ---- pack_conv ----------------------------------------------------------------------------------

ConvShape weight_shape(const char* op, const Tensor& weight, int64_t groups) {
  check(weight.dim() == 4, op,
        ": weight must be 4-D (out_channels, in_channels / groups, kernel_h, kernel_w), got shape ",
        shape_text(weight.sizes()));
  check(weight.numel() > 0, op, ": weight must not be empty, got shape ",
        shape_text(weight.sizes()));
  check(groups >= 1, op, ": groups must be at least 1, got ", groups);
  check(weight.size(0) % groups == 0, op, ": groups must divide the ", weight.size(0),
        " output channels of weight, got ", groups);
  ConvShape shape{};
  shape.out_channels = weight.size(0);
  shape.in_channels = weight.size(1) * groups;
  shape.groups = groups;
  shape.kernel_h = weight.size(2);
  shape.kernel_w = weight.size(3);
  return shape;
}

ScalarType packed_dtype(const PlanInfo& plan) {
  return plan.pack > 1 ? ScalarType::BFloat16 : ScalarType::Float;
}

Tensor pack_conv(Tensor weight, int64_t groups, std::string plan_name) {
  const char* op = "pack_conv";
  const ConvShape shape = weight_shape(op, weight, groups);
  const DType dtype = kernel_dtype(weight, op, "weight");
  const PlanInfo& plan = parse_plan(op, plan_name);
  if (plan.plan == Plan::kTorch) {
    // PyTorch's own layout; always a copy, so that the packed weight never aliases the parameter.
    Tensor packed =
        empty_nhwc(weight, weight.size(0), weight.size(1), weight.size(2), weight.size(3));
    torch::stable::copy_(packed, weight);
    return packed;
  }
  check_plan_dtype(op, plan, dtype);
  check_plan_weight(op, plan, shape);
  Tensor dense = torch::stable::new_empty(weight, weight.sizes(), ScalarType::Float);
  torch::stable::copy_(dense, weight);
  Tensor packed = torch::stable::new_empty(weight, packed_shape(plan, shape), packed_dtype(plan));
  advise_huge_pages(packed.mutable_data_ptr(),
                    packed.numel() * static_cast<int64_t>(packed.element_size()));
  const float* source = static_cast<const float*>(dense.const_data_ptr());
  if (plan.is_winograd()) {
    winograd_pack(plan.plan, shape, source, packed.mutable_data_ptr());
  } else {
    direct_pack(plan.plan, shape, source, packed.mutable_data_ptr());
  }
  return packed;
}

// ---- conv_bn_act_packed -------------------------------------------------------------------------

struct ConvCall {
  Tensor x;  // 4-D
  ConvShape shape;
  DType dtype;
  bool relu;
  bool batched;
};

void check_pair(const char* op, const char* name, const IntPair& pair, int64_t least) {
  check(pair.size() == 2, op, ": ", name, " must be an int or a pair of ints, got ",
        shape_text(pair));
  check(pair[0] >= least && pair[1] >= least, op, ": ", name, " must be at least ", least, ", got ",
        shape_text(pair));
}

ConvCall check_call(const char* op, const Tensor& x, const Tensor& scale, const Tensor& shift,
                    const IntPair& kernel_size, const IntPair& stride, const IntPair& padding,
                    const IntPair& dilation, int64_t groups, const std::string& act) {
  ConvCall call;
  check(x.dim() == 3 || x.dim() == 4, op,
        ": x must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape ", shape_text(x.sizes()));
  call.dtype = kernel_dtype(x, op, "x");
  check_pair(op, "kernel_size", kernel_size, 1);
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  check(act == "relu" || act == "none", op, ": act must be \"relu\" or \"none\", got \"", act,
        "\"");
  call.relu = act == "relu";
  call.batched = x.dim() == 4;
  call.x = call.batched ? x : torch::stable::unsqueeze(x, 0);
  const auto vector_dtype = call.dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  check_dtype(scale, vector_dtype, op, "scale");
  check_dtype(shift, vector_dtype, op, "shift");
  check_cpu(scale, op, "scale");
  check_cpu(shift, op, "shift");
  check(scale.dim() == 1 && scale.numel() > 0, op,
        ": scale must be 1-D, one value per output channel, got shape ", shape_text(scale.sizes()));
  check_shape(shift, scale.sizes(), op, "shift");
  check(groups >= 1, op, ": groups must be at least 1, got ", groups);

  ConvShape& shape = call.shape;
  shape.batch = call.x.size(0);
  shape.in_channels = call.x.size(1);
  shape.in_h = call.x.size(2);
  shape.in_w = call.x.size(3);
  shape.out_channels = scale.numel();
  shape.groups = groups;
  shape.kernel_h = kernel_size[0], shape.kernel_w = kernel_size[1];
  shape.stride_h = stride[0], shape.stride_w = stride[1];
  shape.pad_h = padding[0], shape.pad_w = padding[1];
  shape.dilation_h = dilation[0], shape.dilation_w = dilation[1];
  check(shape.in_channels % groups == 0 && shape.out_channels % groups == 0, op,
        ": groups must divide the ", shape.in_channels, " input and ", shape.out_channels,
        " output channels, got ", groups);
  const int64_t reach_h = shape.dilation_h * (shape.kernel_h - 1) + 1;
  const int64_t reach_w = shape.dilation_w * (shape.kernel_w - 1) + 1;
  check(shape.in_h + 2 * shape.pad_h >= reach_h && shape.in_w + 2 * shape.pad_w >= reach_w, op,
        ": x must be at least as large as the kernel: the padded input is ",
        shape.in_h + 2 * shape.pad_h, " x ", shape.in_w + 2 * shape.pad_w, ", the kernel spans ",
        reach_h, " x ", reach_w);
  return call;
}

// The residual as 4-D dense NHWC, checked.
std::optional<Tensor> check_residual(const char* op, const std::optional<Tensor>& residual,
                                     const ConvCall& call) {
  if (!residual) return std::nullopt;
  const ConvShape& s = call.shape;
  std::vector<int64_t> expected{s.batch, s.out_channels, s.out_h(), s.out_w()};
  if (!call.batched) expected.erase(expected.begin());
  check_shape(*residual, expected, op, "residual");
  check_dtype(*residual, call.x.scalar_type(), op, "residual");
  check_cpu(*residual, op, "residual");
  return to_nhwc(call.batched ? *residual : torch::stable::unsqueeze(*residual, 0));
}

void check_packed(const char* op, const Tensor& packed, const ConvCall& call,
                  const PlanInfo& plan) {
  check_cpu(packed, op, "packed");
  if (plan.plan == Plan::kTorch) {
    check_shape(packed, packed_shape(plan, call.shape), op, "packed");
    check_dtype(packed, call.x.scalar_type(), op, "packed");
    return;
  }
  check_plan_dtype(op, plan, call.dtype);
  check_plan_weight(op, plan, call.shape);
  check_plan_geometry(op, plan, call.shape);
  check_shape(packed, packed_shape(plan, call.shape), op, "packed");
  check_dtype(packed, packed_dtype(plan), op, "packed");
  check(plan.pack == 1 || kernels().bf16_products, op, ": plan \"", plan.name,
        "\" needs avx512_bf16, the kernels in use are ", kernels().isa);
  check(packed.is_contiguous(), op, ": packed must be contiguous, as pack_conv returned it");
}

const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

Tensor run_ours(const ConvCall& call, const PlanInfo& plan, const Tensor& packed,
                const Tensor& scale, const Tensor& shift, const std::optional<Tensor>& residual) {
  const ConvShape& s = call.shape;
  const Tensor x = to_nhwc(call.x);
  const Tensor y = empty_nhwc(x, s.batch, s.out_channels, s.out_h(), s.out_w());
  const ConvArgs args{s,
                      call.dtype,
                      plan.plan,
                      call.relu,
                      x.const_data_ptr(),
                      static_cast<const float*>(packed.const_data_ptr()),
                      static_cast<const float*>(scale.const_data_ptr()),
                      static_cast<const float*>(shift.const_data_ptr()),
                      pointer(residual),
                      y.mutable_data_ptr()};
  run_conv(ConvJobs(args, thread_count()));
  return y;
}

Tensor torch_convolution(const ConvCall& call, const Tensor& weight) {
  using torch::stable::detail::from;
  const ConvShape& s = call.shape;
  std::array<StableIValue, 9> stack{from(to_nhwc(call.x)),
                                    from(weight),
                                    from(std::nullopt),
                                    from(IntPair{s.stride_h, s.stride_w}),
                                    from(IntPair{s.pad_h, s.pad_w}),
                                    from(IntPair{s.dilation_h, s.dilation_w}),
                                    from(false),
                                    from(IntPair{0, 0}),
                                    from(s.groups)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// PyTorch's convolution, then the whole epilogue in one pass over its result, in place.
Tensor run_torch(const ConvCall& call, const Tensor& weight, const Tensor& scale,
                 const Tensor& shift, const std::optional<Tensor>& residual) {
  const ConvShape& s = call.shape;
  Tensor y = torch_convolution(call, weight);
  if (!has_nhwc_strides(y)) {
    Tensor dense = empty_nhwc(y, s.batch, s.out_channels, s.out_h(), s.out_w());
    torch::stable::copy_(dense, y);
    y = dense;
  }
  const EpilogueArgs args{call.dtype,
                          call.relu,
                          s.out_channels,
                          scale.const_data_ptr(),
                          shift.const_data_ptr(),
                          pointer(residual),
                          y.mutable_data_ptr()};
  const Kernels& isa = kernels();
  for_each_span(s.out_pixels(), ceil_div(kSpanGrain, s.out_channels),
                [&](int64_t begin, int64_t end) { isa.epilogue(args, begin, end); });
  return y;
}

Tensor conv_bn_act_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift,
                          std::optional<Tensor> residual, IntPair kernel_size, IntPair stride,
                          IntPair padding, IntPair dilation, int64_t groups, std::string act,
                          std::string plan_name) {
  const char* op = "conv_bn_act_packed";
  const PlanInfo& plan = parse_plan(op, plan_name);
  const ConvCall call =
      check_call(op, x, scale, shift, kernel_size, stride, padding, dilation, groups, act);
  check_packed(op, packed, call, plan);
  const std::optional<Tensor> dense_residual = check_residual(op, residual, call);
  const ConvShape& s = call.shape;
  Tensor y;
  if (s.out_pixels() == 0) {
    y = empty_nhwc(x, s.batch, s.out_channels, s.out_h(), s.out_w());
  } else {
    scale = torch::stable::contiguous(scale);
    shift = torch::stable::contiguous(shift);
    y = plan.plan == Plan::kTorch ? run_torch(call, packed, scale, shift, dense_residual)
                                  : run_ours(call, plan, packed, scale, shift, dense_residual);
  }
  return call.batched ? y : torch::stable::squeeze(y, 0);
}

// ---- add_relu -----------------------------------------------------------------------------------

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// `tensor` with the strides of `like`, which is dense.
Tensor with_layout(const Tensor& tensor, const Tensor& like) {
  if (same_strides(tensor, like)) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor add_relu(Tensor a, Tensor b) {
  const char* op = "add_relu";
  const DType dtype = kernel_dtype(a, op, "a");
  check_shape(b, a.sizes(), op, "b");
  check_dtype(b, a.scalar_type(), op, "b");
  check(b.is_cpu(), op, ": b must be on cpu, where a is, got another device");
  const int64_t numel = a.numel();
  if (numel == 0) return torch::stable::new_empty(a, a.sizes());  // as _empty_like in ops.py
  Tensor y = torch::stable::empty_like(a);  // dense, in a's order of dimensions
  const Tensor dense_a = with_layout(a, y), dense_b = with_layout(b, y);
  const AddReluArgs args{dtype, dense_a.const_data_ptr(), dense_b.const_data_ptr(),
                         y.mutable_data_ptr()};
  const Kernels& isa = kernels();
  for_each_span(numel, kSpanGrain,
                [&](int64_t begin, int64_t end) { isa.add_relu(args, begin, end); });
  return y;
}

// ---- content_sample, content_equal, cpu_isa
// -------------------------------------------------------

Tensor sample_op(std::vector<Tensor> tensors) {
  check(!tensors.empty(), "content_sample: tensors must not be empty");
  const std::vector<char> sample = content_sample(tensors);
  Tensor result =
      torch::stable::new_empty(tensors[0], {static_cast<int64_t>(sample.size())}, ScalarType::Byte);
  std::copy(sample.begin(), sample.end(), static_cast<char*>(result.mutable_data_ptr()));
  return result;
}

bool equal_op(std::vector<Tensor> tensors, Tensor sample) {
  check_dtype(sample, ScalarType::Byte, "content_equal", "sample");
  return content_equal(tensors, static_cast<const char*>(sample.const_data_ptr()), sample.numel());
}

int64_t hash_op(std::vector<Tensor> tensors) { return content_hash(tensors); }

std::string cpu_isa() { return kernels().isa; }

void set_cpu_isa(std::string isa) { use_isa(isa); }

std::string features_op() { return cpu_features(); }

// ---- multiply_peak, read_words ------------------------------------------------------------------

double multiply_peak_op(double seconds, std::string dtype) {
  const char* op = "multiply_peak";
  check(seconds > 0 && seconds <= 60, op, ": seconds must be positive and at most 60, got ",
        seconds);
  check(dtype == "float32" || dtype == "bfloat16", op,
        ": dtype must be \"float32\" or \"bfloat16\", got \"", dtype, "\"");
  return dtype == "float32" ? multiply_peak(seconds) : multiply_peak_bf16(seconds);
}

int64_t read_words_op(std::vector<Tensor> tensors) {
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
  m.impl("pack_conv", TORCH_BOX(&resnet_fused::pack_conv));
  m.impl("conv_bn_act_packed", TORCH_BOX(&resnet_fused::conv_bn_act_packed));
  m.impl("add_relu", TORCH_BOX(&resnet_fused::add_relu));
  m.impl("content_sample", TORCH_BOX(&resnet_fused::sample_op));
  m.impl("content_equal", TORCH_BOX(&resnet_fused::equal_op));
  m.impl("content_hash", TORCH_BOX(&resnet_fused::hash_op));
  m.impl("read_words", TORCH_BOX(&resnet_fused::read_words_op));
}

// Ops without a tensor argument have no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&resnet_fused::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&resnet_fused::set_cpu_isa));
  m.impl("cpu_features", TORCH_BOX(&resnet_fused::features_op));
  m.impl("multiply_peak", TORCH_BOX(&resnet_fused::multiply_peak_op));
}
