// The entries for the tests of the head's kernels.
#include <cstring>

#include "cuda/sm80/head.cuh"

using namespace resnet_fused::sm80;

namespace {

template <typename T>
const void* in(const void* from, int64_t count, const char* name) {
  if (!from) return nullptr;
  return memcpy(emu::dev_alloc(sizeof(T) * count, name, emu::kReadOnly), from, sizeof(T) * count);
}

// The kernel writes to a buffer of the emulator's in the place of `y`, which gets a copy.
template <typename T>
emu::Result run(dim3 grid, int shared_bytes, int order, void*& y, int64_t count,
                const std::function<void()>& body) {
  void* const host = y;
  y = emu::dev_alloc(sizeof(T) * count, "y", emu::kWriteOnce);
  emu::Options options;
  options.order = order;
  const emu::Result result = emu::launch(grid, dim3(kHeadThreads), shared_bytes, body, options);
  memcpy(host, y, sizeof(T) * count);
  return result;
}

template <typename T>
emu::Result run_pool(Pool p, int images, int order) {
  emu::dev_reset();
  constexpr int kBytes = int(sizeof(T));
  p.x = in<T>(p.x, int64_t(images) * p.pixels * p.channels, "x");
  return run<T>(dim3(images, pool_chunks(p.channels, kBytes)), pool_shared_bytes(kBytes), order,
                p.y, int64_t(images) * p.channels, [&] { pool_kernel<T>(p); });
}

template <typename T>
emu::Result run_linear(Linear p, int order) {
  emu::dev_reset();
  p.x = in<T>(p.x, int64_t(p.images) * p.inputs, "x");
  p.weight = in<T>(p.weight, int64_t(p.outputs) * p.inputs, "weight");
  p.bias = in<T>(p.bias, p.outputs, "bias");
  const bool one = p.images == 1;
  return run<T>(dim3(ceil_div(p.outputs, kHeadWarps), ceil_div(p.images, one ? 1 : kLinearImages)),
                0, order, p.y, int64_t(p.images) * p.outputs, [&] {
                  if (one)
                    linear_kernel<T, 1>(p);
                  else
                    linear_kernel<T, kLinearImages>(p);
                });
}

}  // namespace

extern "C" void pool_run(const Pool* p, int images, int type, int order, char* error, int size) {
  const Type kind = Type(type);
  const auto go = kind == Type::kBFloat16  ? run_pool<__nv_bfloat16>
                  : kind == Type::kFloat16 ? run_pool<__half>
                                           : run_pool<float>;
  snprintf(error, size, "%s", go(*p, images, order).error.c_str());
}
extern "C" void linear_run(const Linear* p, int type, int order, char* error, int size) {
  const Type kind = Type(type);
  const auto go = kind == Type::kBFloat16  ? run_linear<__nv_bfloat16>
                  : kind == Type::kFloat16 ? run_linear<__half>
                                           : run_linear<float>;
  snprintf(error, size, "%s", go(*p, order).error.c_str());
}
