// The entry for the tests of the head's kernel.
#include <cstring>

#include "cuda/sm80/head.cuh"

using namespace resnet_fused::sm80;

namespace {

template <typename T>
emu::Result run(const HeadProblem& sizes, Head p, int order) {
  emu::dev_reset();
  const auto in = [](const void* from, int64_t count, const char* name) -> void* {
    if (!from) return nullptr;
    void* const room = emu::dev_alloc(sizeof(T) * count, name, emu::kReadOnly);
    return memcpy(room, from, sizeof(T) * count);
  };
  const auto out = [](int64_t count, const char* name) {
    return emu::dev_alloc(sizeof(T) * count, name, emu::kWriteOnce);
  };
  void *const host_pooled = p.pooled, *const host_y = p.y;
  const int64_t means = sizes.images * sizes.channels, products = sizes.images * sizes.classes;
  p.x = in(p.x, means * sizes.pixels, "x");
  p.weight = in(p.weight, sizes.classes * sizes.channels, "weight");
  p.bias = in(p.bias, sizes.classes, "bias");
  p.pooled = out(means, "pooled");
  p.y = out(products, "y");
  p.pixels = int(sizes.pixels);
  p.channels = int(sizes.channels);
  p.classes = int(sizes.classes);
  p.block_classes = head_block_classes(sizes);
  emu::Options options;
  options.order = order;
  const emu::Result result = emu::launch(
      dim3(head_blocks(sizes), unsigned(sizes.images)), dim3(kHeadThreads),
      head_shared_bytes(p.channels, int(sizeof(T))), [&] { head_kernel<T>(p); }, options);
  memcpy(host_pooled, p.pooled, sizeof(T) * means);
  memcpy(host_y, p.y, sizeof(T) * products);
  return result;
}

}  // namespace

extern "C" void head_run(const HeadProblem* sizes, const Head* p, int type, int order, char* error,
                         int size) {
  const Type kind = Type(type);
  const auto go = kind == Type::kBFloat16  ? run<__nv_bfloat16>
                  : kind == Type::kFloat16 ? run<__half>
                                           : run<float>;
  snprintf(error, size, "%s", go(*sizes, *p, order).error.c_str());
}
extern "C" void head_refuses_of(const HeadProblem* sizes, int type, char* text, int size) {
  snprintf(text, size, "%s", head_refuses(*sizes, Type(type)).c_str());
}
extern "C" int head_blocks_of(const HeadProblem* sizes) { return head_blocks(*sizes); }
