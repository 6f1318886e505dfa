#include "cuda/conv_arguments.h"

#include "cuda/arguments.h"

namespace resnet_fused::cuda {
namespace {

constexpr int64_t kLargest = (int64_t{1} << 31) - 1;

void check_pair(const char* op, const char* name, const IntPair& pair, int64_t least) {
  check(pair.size() == 2, op, ": ", name, " must be an int or a pair of ints, got ",
        shape_text(pair));
  check(pair[0] >= least && pair[1] >= least, op, ": ", name, " must be at least ", least, ", got ",
        shape_text(pair));
  check(pair[0] <= kLargest && pair[1] <= kLargest, op, ": ", name, " must be at most ", kLargest,
        ", got ", shape_text(pair));
}

void check_image(const char* op, const char* name, const Tensor& x) {
  check(x.dim() == 3 || x.dim() == 4, op, ": ", name,
        " must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape ", shape_text(x.sizes()));
}

int64_t output_size(const char* op, const IntPair& padded, const IntPair& reach,
                    const IntPair& stride, int i) {
  check(padded[0] >= reach[0] && padded[1] >= reach[1], op,
        ": x must be at least as large as the kernel: the padded input is ", padded[0], " x ",
        padded[1], ", the kernel spans ", reach[0], " x ", reach[1]);
  return (padded[i] - reach[i]) / stride[i] + 1;
}

void check_shortcut(const ConvArguments& a, const std::vector<int64_t>& result) {
  const char* const names[] = {"shortcut_x", "shortcut_packed", "shortcut_scale", "shortcut_shift"};
  const MaybeTensor* const given[] = {&a.shortcut_x, &a.shortcut_packed, &a.shortcut_scale,
                                      &a.shortcut_shift};
  for (int i = 0; i < 4; ++i)
    check(given[i]->has_value(), a.op, ": ", names[i],
          " must be a tensor beside a shortcut, got None");
  check(!a.residual, a.op, ": residual must be None beside a shortcut, got a tensor");
  check(a.groups == 1, a.op, ": groups must be 1 beside a shortcut, got ", a.groups);
  const Tensor& x = *a.shortcut_x;
  check_image(a.op, "shortcut_x", x);
  check_like(a.op, "shortcut_x", x, a.x, a.x.scalar_type());
  const std::vector<int64_t> sizes = image_sizes(x), vector{a.scale.numel()};
  check_shape(*a.shortcut_packed, std::vector<int64_t>{a.scale.numel(), sizes[1], 1, 1}, a.op,
              "shortcut_packed");
  check_like(a.op, "shortcut_packed", *a.shortcut_packed, a.x, a.x.scalar_type());
  for (int i = 2; i < 4; ++i) {
    check_like(a.op, names[i], **given[i], a.x, ScalarType::Float);
    check_shape(**given[i], vector, a.op, names[i]);
  }
  check_pair(a.op, "shortcut_stride", a.shortcut_stride, 1);
  const IntPair size{sizes[2], sizes[3]}, one{1, 1};
  const std::vector<int64_t> found{sizes[0], a.scale.numel(),
                                   output_size(a.op, size, one, a.shortcut_stride, 0),
                                   output_size(a.op, size, one, a.shortcut_stride, 1)};
  check(found == result && x.dim() == a.x.dim(), a.op,
        ": the shortcut's output must have the convolution's shape ", shape_text(result), ", got ",
        shape_text(found));
}

}  // namespace

std::vector<int64_t> image_sizes(const Tensor& x) {
  const auto sizes = x.sizes();
  std::vector<int64_t> all(sizes.begin(), sizes.end());
  if (all.size() == 3) all.insert(all.begin(), 1);
  return all;
}

std::vector<int64_t> check_arguments(const ConvArguments& a) {
  check_image(a.op, "x", a.x);
  check_device(a.op, "x", a.x);
  check_elements(a.op, "x", a.x);
  const ScalarType type = a.x.scalar_type();
  check(a.scale.dim() == 1 && a.scale.numel() > 0, a.op,
        ": scale must be 1-D, one value per output channel, got shape ",
        shape_text(a.scale.sizes()));
  check_pair(a.op, "kernel_size", a.kernel_size, 1);
  check_pair(a.op, "stride", a.stride, 1);
  check_pair(a.op, "padding", a.padding, 0);
  check_pair(a.op, "dilation", a.dilation, 1);
  const std::vector<int64_t> sizes = image_sizes(a.x);
  const int64_t channels = a.scale.numel();
  check(a.groups >= 1, a.op, ": groups must be at least 1, got ", a.groups);
  check(channels % a.groups == 0 && sizes[1] % a.groups == 0, a.op, ": groups must divide the ",
        sizes[1], " input and ", channels, " output channels, got ", a.groups);
  check_shape(
      a.packed,
      std::vector<int64_t>{channels, sizes[1] / a.groups, a.kernel_size[0], a.kernel_size[1]}, a.op,
      "packed");
  check_like(a.op, "packed", a.packed, a.x, type);
  check(a.act == "relu" || a.act == "none", a.op, ": act must be \"relu\" or \"none\", got \"",
        a.act, "\"");
  check_like(a.op, "scale", a.scale, a.x, ScalarType::Float);
  check_like(a.op, "shift", a.shift, a.x, ScalarType::Float);
  check_shape(a.shift, std::vector<int64_t>{channels}, a.op, "shift");
  IntPair padded, reach;
  for (int i = 0; i < 2; ++i) {
    padded.push_back(sizes[2 + i] + 2 * a.padding[i]);
    reach.push_back(a.dilation[i] * (a.kernel_size[i] - 1) + 1);
    check(padded[i] <= kLargest, a.op, ": x must be at most ", kLargest,
          " long with its padding, got ", padded[i]);
  }
  const std::vector<int64_t> result{sizes[0], channels,
                                    output_size(a.op, padded, reach, a.stride, 0),
                                    output_size(a.op, padded, reach, a.stride, 1)};
  if (a.residual) {
    check_like(a.op, "residual", *a.residual, a.x, type);
    const bool batched = a.x.dim() == 4;
    check_shape(*a.residual, std::vector<int64_t>(result.begin() + !batched, result.end()), a.op,
                "residual");
  }
  if (a.shortcut_x || a.shortcut_packed || a.shortcut_scale || a.shortcut_shift)
    check_shortcut(a, result);
  return result;
}

}  // namespace resnet_fused::cuda
