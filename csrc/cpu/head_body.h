// The mean over the map and the linear layer behind it, over `Vec`. Both are memory-bound.
#include "cpu/head.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

template <typename T>
static void mean_channels(const MeanArgs& args, int64_t image, int64_t begin) {
  const int64_t end = min_of(begin + kMeanChannels, args.channels);
  const T* x = static_cast<const T*>(args.x) + image * args.pixels * args.channels;
  T* y = static_cast<T*>(args.y) + image * args.channels;
  const Reg share = Vec::set1(1.0f / static_cast<float>(args.pixels));
  for (int64_t c = begin; c < end; c += Vec::kWidth) {
    const int64_t lanes = min_of(end - c, Vec::kWidth);
    // Two sums, or each addition would wait for the one before.
    Reg even = Vec::zero(), odd = Vec::zero();
    int64_t pixel = 0;
    for (; pixel + 2 <= args.pixels; pixel += 2) {
      even = Vec::add(even, Vec::load(x + pixel * args.channels + c, lanes));
      odd = Vec::add(odd, Vec::load(x + (pixel + 1) * args.channels + c, lanes));
    }
    if (pixel < args.pixels) {
      even = Vec::add(even, Vec::load(x + pixel * args.channels + c, lanes));
    }
    Vec::store(y + c, Vec::mul(Vec::add(even, odd), share), lanes);
  }
}

template <typename T>
static void mean_part(const MeanArgs& args, int64_t begin, int64_t end) {
  const int64_t steps = mean_steps(args.channels);
  for (int64_t i = begin; i < end; ++i) {
    mean_channels<T>(args, i / steps, i % steps * kMeanChannels);
  }
}

// Steps [begin, end) of kMeanChannels channels, counted through all images.
static void mean(const MeanArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return mean_part<float>(args, begin, end);
    case DType::kBFloat16:
      return mean_part<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return mean_part<Float16>(args, begin, end);
    case DType::kFloat64:
      return;  // refused by the op
  }
}

static inline float total_of(Reg lanes) {
  float values[Vec::kWidth];
  Vec::store(values, lanes);
  for (int half = Vec::kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) values[i] += values[i + half];
  }
  return values[0];
}

// kOutputs outputs from `first` on, of all images: so many chains of sums at a time.
template <int kOutputs, typename T>
static void linear_outputs(const LinearArgs& args, int64_t first) {
  const T* weight = static_cast<const T*>(args.weight) + first * args.inputs;
  for (int64_t image = 0; image < args.images; ++image) {
    const T* x = static_cast<const T*>(args.x) + image * args.inputs;
    Reg sum[kOutputs];
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) sum[i] = Vec::zero();
    for (int64_t k = 0; k < args.inputs; k += Vec::kWidth) {
      const int64_t lanes = min_of(args.inputs - k, Vec::kWidth);
      const Reg value = Vec::load(x + k, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < kOutputs; ++i) {
        sum[i] = Vec::fma(value, Vec::load(weight + i * args.inputs + k, lanes), sum[i]);
      }
    }
    T* y = static_cast<T*>(args.y) + image * args.outputs + first;
    for (int i = 0; i < kOutputs; ++i) {
      const float bias = args.bias ? to_float(static_cast<const T*>(args.bias)[first + i]) : 0.0f;
      y[i] = from_float<T>(total_of(sum[i]) + bias);
    }
  }
}

template <typename T>
static void linear_part(const LinearArgs& args, int64_t begin, int64_t end) {
  int64_t output = begin;
  for (; output + 4 <= end; output += 4) linear_outputs<4, T>(args, output);
  for (; output < end; ++output) linear_outputs<1, T>(args, output);
}

// Outputs [begin, end) of all images.
static void linear(const LinearArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return linear_part<float>(args, begin, end);
    case DType::kBFloat16:
      return linear_part<BFloat16>(args, begin, end);
    case DType::kFloat16:
      return linear_part<Float16>(args, begin, end);
    case DType::kFloat64:
      return;  // refused by the op
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
