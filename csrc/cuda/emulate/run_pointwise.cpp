// The entry for the tests of the pointwise kernels.
#include <cstring>

#include "cuda/sm80/scale_shift.cuh"

using namespace resnet_fused::sm80;

namespace {

// `skip`: elements between an aligned address and the tensors.
template <typename T>
emu::Result run(ScaleShift p, Type type, int skip, int blocks) {
  emu::dev_reset();
  const auto in = [&](const void* from, size_t size, int64_t count, const char* name) -> void* {
    if (!from) return nullptr;
    char* const room =
        static_cast<char*>(emu::dev_alloc(size * (count + skip), name, emu::kReadOnly));
    memcpy(room + size * skip, from, size * count);
    return room + size * skip;
  };
  void* const host_y = p.y;
  p.x = in(p.x, sizeof(T), p.count, "x");
  p.residual = in(p.residual, sizeof(T), p.count, "residual");
  p.scale = static_cast<float*>(in(p.scale, 4, p.channels, "scale"));
  p.shift = static_cast<float*>(in(p.shift, 4, p.channels, "shift"));
  p.y = static_cast<T*>(emu::dev_alloc(sizeof(T) * (p.count + skip), "y", emu::kWriteOnce)) + skip;
  p.aligned = in_vectors(p, type);
  const emu::Result result =
      emu::launch(dim3(blocks), dim3(kPointwiseThreads), 0, [&] { scale_shift_kernel<T>(p); });
  memcpy(host_y, p.y, sizeof(T) * p.count);
  return result;
}

}  // namespace

extern "C" void scale_shift_run(const ScaleShift* p, int type, int skip, int blocks, char* error,
                                int size) {
  const Type kind = Type(type);
  const auto go = kind == Type::kBFloat16  ? run<__nv_bfloat16>
                  : kind == Type::kFloat16 ? run<__half>
                                           : run<float>;
  snprintf(error, size, "%s", go(*p, kind, skip, blocks).error.c_str());
}
extern "C" int pointwise_blocks_of(int64_t count, int each, int multiprocessors) {
  return pointwise_blocks(count, each, {multiprocessors, 0});
}
