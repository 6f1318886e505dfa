// Planted faults: proof that the sanitizers see what our kernels do. Only in sanitized builds.
//
// Each fault runs a real kernel, or the code around it, with one element, row or ordering wrong;
// tests/test_sanitize.py runs each in a process of its own and expects the report that ends it.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/arena.h"
#include "cpu/conv_jobs.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "cpu/team.h"

namespace resnet_fused {
namespace {

// A heap block of exactly `count` elements, whose surroundings AddressSanitizer guards.
template <typename T>
struct Block {
  explicit Block(int64_t count) : memory(new T[static_cast<size_t>(count)]()) {}
  T* data() const { return memory.get(); }
  std::unique_ptr<T[]> memory;
};

// relu(a + b) of `count` elements over blocks of `a_count` and `y_count`.
template <typename T>
void add_relu_over(DType dtype, int64_t count, int64_t a_count, int64_t y_count) {
  const Block<T> a(a_count), b(count), y(y_count);
  kernels().add_relu({dtype, a.data(), b.data(), y.data()}, 0, count);
}

// A 3 x 3 convolution of 20 channels, with `missing` elements too few in x or y.
void convolve(Plan plan, int64_t x_missing = 0, int64_t y_missing = 0) {
  ConvShape shape{};
  shape.batch = 1, shape.in_h = 9, shape.in_w = 7;
  shape.in_channels = 20, shape.out_channels = 40, shape.groups = 1;
  shape.kernel_h = shape.kernel_w = 3;
  shape.stride_h = shape.stride_w = shape.dilation_h = shape.dilation_w = 1;
  shape.pad_h = shape.pad_w = 1;
  int64_t packed_count = 1;
  for (const int64_t size : packed_shape(plan_info(plan), shape)) packed_count *= size;
  const Block<float> x(shape.in_h * shape.in_w * shape.in_channels - x_missing);
  const Block<float> y(shape.out_pixels() * shape.out_channels - y_missing);
  const Block<float> packed(packed_count), scale(shape.out_channels), shift(shape.out_channels);
  const ConvArgs args{shape,         DType::kFloat32, plan,         true,    x.data(),
                      packed.data(), scale.data(),    shift.data(), nullptr, y.data()};
  run_conv(ConvJobs(args, Workers()));
}

// Two jobs that are certain to run on two threads write the same places: many, because two writes
// at the very same moment can escape.
void share_scratch() {
  constexpr int kCount = 1000;
  const Block<float> scratch(kCount);
  std::atomic<int> arrived{0};
  for_each_job(2, [&](int64_t job) {
    arrived.fetch_add(1, std::memory_order_relaxed);
    while (arrived.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
    for (int i = 0; i < kCount; ++i) scratch.data()[i] = static_cast<float>(job);
  });
}

void overflow() {
  volatile int64_t largest = std::numeric_limits<int64_t>::max();
  largest = largest + 1;
}

void shift() {
  volatile int lanes = 40;
  lanes = 1 << lanes;
}

const std::map<std::string, void (*)()>& faults() {
  using Half = uint16_t;
  static const std::map<std::string, void (*)()> all = {
      // address
      {"read", [] { add_relu_over<float>(DType::kFloat32, 64, 63, 64); }},
      {"write", [] { add_relu_over<float>(DType::kFloat32, 64, 64, 63); }},
      {"masked_read", [] { add_relu_over<float>(DType::kFloat32, 61, 60, 61); }},
      {"masked_write", [] { add_relu_over<float>(DType::kFloat32, 61, 61, 60); }},
      {"masked_read_16", [] { add_relu_over<Half>(DType::kBFloat16, 61, 60, 61); }},
      {"masked_write_16", [] { add_relu_over<Half>(DType::kFloat16, 61, 61, 60); }},
      {"direct_read", [] { convolve(Plan::kDirect, 1); }},
      {"direct_write", [] { convolve(Plan::kDirect, 0, 1); }},
      {"winograd_read", [] { convolve(Plan::kWinograd4, 1); }},
      {"winograd_write", [] { convolve(Plan::kWinograd4, 0, 1); }},
      {"scratch", [] { thread_scratch(5000), thread_scratch(1000)[1000] = 1.0f; }},
      // undefined
      {"overflow", overflow},
      {"shift", shift},
      // thread
      {"race", share_scratch},
      // none of it
      {"none", [] {
         add_relu_over<float>(DType::kFloat32, 61, 61, 61);
         convolve(Plan::kDirect);
         convolve(Plan::kWinograd4);
         thread_scratch(5000), thread_scratch(1000)[999] = 1.0f;
       }}};
  return all;
}

void plant(std::string fault) {
  const auto found = faults().find(fault);
  check(found != faults().end(), "plant: fault must be one of those in faults.cpp, got ", fault);
  found->second();
}

std::string sanitizer() {
#if defined(__SANITIZE_ADDRESS__)
  return "address";
#elif defined(__SANITIZE_THREAD__)
  return "thread";
#else
  return "";
#endif
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY(resnet_fused_sanitize, m) {
  m.def("plant(str fault) -> ()");
  m.def("sanitizer() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_sanitize, CompositeExplicitAutograd, m) {
  m.impl("sanitizer", TORCH_BOX(&resnet_fused::sanitizer));
  m.impl("plant", TORCH_BOX(&resnet_fused::plant));
}
