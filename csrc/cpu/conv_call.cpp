#include "cpu/conv_call.h"

#include <array>

#include "cpu/conv_jobs.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/pooled_stem.h"

namespace resnet_fused {
namespace {

using IntPair = std::vector<int64_t>;

// Sums and products of two such values and a size stay within 64 bits.
constexpr int64_t kLargest = (int64_t{1} << 31) - 1;

void check_pair(const OpName& op, const char* name, const int64_t* pair, int64_t least) {
  check(pair[0] >= least && pair[1] >= least, op, ": ", name, " must be at least ", least, ", got ",
        "(", pair[0], ", ", pair[1], ")");
  check(pair[0] <= kLargest && pair[1] <= kLargest, op, ": ", name, " must be at most ", kLargest,
        ", got (", pair[0], ", ", pair[1], ")");
}

void check_countable(const OpName& op, const char* name, const std::array<int64_t, 4>& sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) {
    check(!__builtin_mul_overflow(count, size, &count), op, ": ", name,
          " must have fewer than 2**63 elements, got shape ", shape_text(sizes));
  }
}

void check_vector(const OpName& op, const char* name, const Tensor& vector, DType dtype) {
  check_dtype(vector, dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float, op, name);
  check_cpu(vector, op, name);
}

void check_packed(const OpName& op, const ConvCall& call, ScalarType input) {
  const Tensor& packed = call.packed;
  const PlanInfo& plan = plan_info(call.plan);
  check_cpu(packed, op, "packed");
  if (call.plan == Plan::kTorch) {
    check_shape(packed, packed_shape(plan, call.shape), op, "packed");
    check_dtype(packed, input, op, "packed");
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

Tensor empty_pooled(const ConvShape& s, const Tensor& like) {
  return empty_nhwc(like, s.batch, s.out_channels, pooled(s.out_h()), pooled(s.out_w()));
}

// pool: in the same pass, which only the plan "stem" can.
Tensor run_ours(const ConvCall& call, const Tensor& x, const std::optional<Tensor>& residual,
                bool pool) {
  const ConvShape& s = call.shape;
  const Tensor y =
      pool ? empty_pooled(s, x) : empty_nhwc(x, s.batch, s.out_channels, s.out_h(), s.out_w());
  const ConvArgs args{s,
                      call.dtype,
                      call.plan,
                      call.relu,
                      x.const_data_ptr(),
                      static_cast<const float*>(call.packed.const_data_ptr()),
                      static_cast<const float*>(call.scale.const_data_ptr()),
                      static_cast<const float*>(call.shift.const_data_ptr()),
                      pointer(residual),
                      y.mutable_data_ptr()};
  const ConvJobs jobs(args, Workers());
  if (pool) {
    run_pooled_stem(jobs);
  } else {
    run_conv(jobs);
  }
  return y;
}

Tensor torch_convolution(const ConvShape& s, const Tensor& x, const Tensor& weight) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{from(x),
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
Tensor run_torch(const ConvCall& call, const Tensor& x, const std::optional<Tensor>& residual) {
  const ConvShape& s = call.shape;
  Tensor y = torch_convolution(s, x, call.packed);
  if (!has_nhwc_strides(y)) {
    Tensor copy = empty_nhwc(y, s.batch, s.out_channels, s.out_h(), s.out_w());
    torch::stable::copy_(copy, y);
    y = copy;
  }
  const EpilogueArgs args{call.dtype,
                          call.relu,
                          s.out_channels,
                          call.scale.const_data_ptr(),
                          call.shift.const_data_ptr(),
                          pointer(residual),
                          y.mutable_data_ptr()};
  const Kernels& isa = kernels();
  for_each_span(s.out_pixels(), ceil_div(kSpanGrain, s.out_channels),
                [&](int64_t begin, int64_t end) { isa.epilogue(args, begin, end); });
  return y;
}

Tensor run_pool(const ConvCall& call, const Tensor& x) {
  const ConvShape& s = call.shape;
  const Tensor y = empty_pooled(s, x);
  const PoolArgs args{call.dtype,     s.out_h(),          s.out_w(),
                      s.out_channels, x.const_data_ptr(), y.mutable_data_ptr()};
  const Kernels& isa = kernels();
  for_each_span(s.batch * pooled(s.out_h()), ceil_div(kSpanGrain, 2 * s.out_w() * s.out_channels),
                [&](int64_t begin, int64_t end) { isa.max_pool(args, begin, end); });
  return y;
}

}  // namespace

Tensor Image::like_input(const Tensor& y) const {
  return batched ? y : torch::stable::squeeze(y, 0);
}

Image check_image(const OpName& op, const Tensor& x) {
  check(x.dim() == 3 || x.dim() == 4, op,
        ": x must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape ", shape_text(x.sizes()));
  const DType dtype = kernel_dtype(x, op, "x");
  const bool batched = x.dim() == 4;
  const Tensor image = batched ? x : torch::stable::unsqueeze(x, 0);
  const auto sizes = image.sizes();
  return {image, {x.scalar_type(), dtype, sizes[0], sizes[1], sizes[2], sizes[3]}, batched};
}

ConvCall check_conv(const OpName& op, const InputShape& x, const Tensor& packed,
                    const Tensor& scale, const Tensor& shift, const ConvSettings& settings) {
  const ConvSettings& s = settings;
  check_pair(op, "kernel_size", s.kernel_size, 1);
  check_pair(op, "stride", s.stride, 1);
  check_pair(op, "padding", s.padding, 0);
  check_pair(op, "dilation", s.dilation, 1);
  check(s.act == "relu" || s.act == "none", op, ": act must be \"relu\" or \"none\", got \"", s.act,
        "\"");
  check_vector(op, "scale", scale, x.dtype);
  check_vector(op, "shift", shift, x.dtype);
  check(scale.dim() == 1 && scale.numel() > 0, op,
        ": scale must be 1-D, one value per output channel, got shape ", shape_text(scale.sizes()));
  check_shape(shift, scale.sizes(), op, "shift");
  check(s.groups >= 1, op, ": groups must be at least 1, got ", s.groups);
  const int64_t outputs = scale.numel();
  check(x.channels % s.groups == 0 && outputs % s.groups == 0, op, ": groups must divide the ",
        x.channels, " input and ", outputs, " output channels, got ", s.groups);

  ConvShape shape{};
  shape.batch = x.batch;
  shape.in_channels = x.channels;
  shape.in_h = x.height, shape.in_w = x.width;
  shape.out_channels = outputs;
  shape.groups = s.groups;
  shape.kernel_h = s.kernel_size[0], shape.kernel_w = s.kernel_size[1];
  shape.stride_h = s.stride[0], shape.stride_w = s.stride[1];
  shape.pad_h = s.padding[0], shape.pad_w = s.padding[1];
  shape.dilation_h = s.dilation[0], shape.dilation_w = s.dilation[1];
  const int64_t reach_h = shape.dilation_h * (shape.kernel_h - 1) + 1;
  const int64_t reach_w = shape.dilation_w * (shape.kernel_w - 1) + 1;
  const int64_t padded_h = shape.in_h + 2 * shape.pad_h, padded_w = shape.in_w + 2 * shape.pad_w;
  check(padded_h >= reach_h && padded_w >= reach_w, op,
        ": x must be at least as large as the kernel: the padded input is ", padded_h, " x ",
        padded_w, ", the kernel spans ", reach_h, " x ", reach_w);
  check_countable(op, "weight", {outputs, shape.group_in(), shape.kernel_h, shape.kernel_w});
  check_countable(op, "the output", {shape.batch, outputs, shape.out_h(), shape.out_w()});

  ConvCall call{shape,  x.dtype,      s.act == "relu", parse_plan(op, s.plan).plan,
                packed, dense(scale), dense(shift)};
  check_packed(op, call, x.type);
  return call;
}

Tensor run_call(const ConvCall& call, const Tensor& x, const std::optional<Tensor>& residual,
                bool pool) {
  const ConvShape& s = call.shape;
  if (s.out_pixels() == 0) {
    return pool ? empty_pooled(s, x) : empty_nhwc(x, s.batch, s.out_channels, s.out_h(), s.out_w());
  }
  std::optional<Tensor> dense_residual;
  if (residual) dense_residual = to_nhwc(*residual);
  const bool at_once = pool && call.plan == Plan::kStem;
  const Tensor y = call.plan == Plan::kTorch ? run_torch(call, to_nhwc(x), dense_residual)
                                             : run_ours(call, to_nhwc(x), dense_residual, at_once);
  return pool && !at_once ? run_pool(call, y) : y;
}

}  // namespace resnet_fused
