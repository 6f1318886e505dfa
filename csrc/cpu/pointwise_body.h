// Memory-bound passes, written once over `Vec`: the epilogue behind PyTorch's convolution and
// add+ReLU.
#include "cpu/pointwise.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// y = act(y * scale + shift + residual) for pixels [begin, end) of a dense NHWC tensor.
template <typename T>
static void epilogue_rows(const EpilogueArgs& args, int64_t begin, int64_t end) {
  const Reg low = Vec::set1(args.relu ? 0.0f : -__builtin_inff());
  const float* scale = static_cast<const float*>(args.scale);
  const float* shift = static_cast<const float*>(args.shift);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    T* y = static_cast<T*>(args.y) + pixel * args.channels;
    const T* residual =
        args.residual ? static_cast<const T*>(args.residual) + pixel * args.channels : nullptr;
    for (int64_t c = 0; c < args.channels; c += Vec::kWidth) {
      const int64_t lanes = args.channels - c;
      if (lanes >= Vec::kWidth) {
        Reg value = Vec::fma(Vec::load(y + c), Vec::load(scale + c), Vec::load(shift + c));
        if (residual) value = Vec::add(value, Vec::load(residual + c));
        Vec::store(y + c, Vec::at_least(value, low));
      } else {
        Reg value = Vec::fma(Vec::load(y + c, lanes), Vec::load(scale + c, lanes),
                             Vec::load(shift + c, lanes));
        if (residual) value = Vec::add(value, Vec::load(residual + c, lanes));
        Vec::store(y + c, Vec::at_least(value, low), lanes);
      }
    }
  }
}

static void epilogue_rows_double(const EpilogueArgs& args, int64_t begin, int64_t end) {
  const double* scale = static_cast<const double*>(args.scale);
  const double* shift = static_cast<const double*>(args.shift);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    double* y = static_cast<double*>(args.y) + pixel * args.channels;
    const double* residual =
        args.residual ? static_cast<const double*>(args.residual) + pixel * args.channels : nullptr;
    for (int64_t c = 0; c < args.channels; ++c) {
      const double value = y[c] * scale[c] + shift[c] + (residual ? residual[c] : 0.0);
      y[c] = args.relu && value < 0.0 ? 0.0 : value;
    }
  }
}

static void epilogue(const EpilogueArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return epilogue_rows<float>(args, begin, end);
    case DType::kBFloat16:
      return epilogue_rows<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return epilogue_rows<Float16>(args, begin, end);
    case DType::kFloat64:
      return epilogue_rows_double(args, begin, end);
  }
}

template <typename T>
static void add_relu_span(const T* a, const T* b, T* y, int64_t begin, int64_t end) {
  const Reg low = Vec::zero();
  int64_t i = begin;
  for (; i + Vec::kWidth <= end; i += Vec::kWidth) {
    Vec::store(y + i, Vec::at_least(Vec::add(Vec::load(a + i), Vec::load(b + i)), low));
  }
  if (i < end) {
    const Reg sum = Vec::add(Vec::load(a + i, end - i), Vec::load(b + i, end - i));
    Vec::store(y + i, Vec::at_least(sum, low), end - i);
  }
}

static void add_relu_span_double(const double* a, const double* b, double* y, int64_t begin,
                                 int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const double sum = a[i] + b[i];
    y[i] = sum < 0.0 ? 0.0 : sum;
  }
}

// y = relu(a + b) for elements [begin, end) of three tensors with one dense layout.
static void add_relu(const AddReluArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return add_relu_span(static_cast<const float*>(args.a), static_cast<const float*>(args.b),
                           static_cast<float*>(args.y), begin, end);
    case DType::kBFloat16:
      return add_relu_span(static_cast<const BFloat16*>(args.a),
                           static_cast<const BFloat16*>(args.b), static_cast<BFloat16*>(args.y),
                           begin, end);
    case DType::kFloat16:
      return add_relu_span(static_cast<const Float16*>(args.a), static_cast<const Float16*>(args.b),
                           static_cast<Float16*>(args.y), begin, end);
    case DType::kFloat64:
      return add_relu_span_double(static_cast<const double*>(args.a),
                                  static_cast<const double*>(args.b), static_cast<double*>(args.y),
                                  begin, end);
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
