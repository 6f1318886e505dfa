// A GPU that computes nothing: linked with the ops and launchers of csrc/cuda in the place of the
// CUDA runtime and the kernels, it takes CPU tensors for its own and keeps what it is asked to
// launch. For tests of the way from tensors to launches, and for what that way costs.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/sm80/head.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/scale_shift.h"
#include "cuda/sm80/stem.h"
#include "cuda/sm80/tail.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/stem.h"
#include "cuda/sm90/tap_shift.h"

namespace {

// ---- kernels: names, at addresses that are only compared ----------------------------------------

struct Kernel {
  std::string name;
  size_t param_bytes;
};

const void* kernel(const std::string& name, size_t param_bytes) {
  static std::deque<Kernel> all;
  for (const Kernel& known : all)
    if (known.name == name) return &known;
  all.push_back({name, param_bytes});
  return &all.back();
}

template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts << " "), ...);
  return text.str();
}

// ---- what was launched
// ---------------------------------------------------------------------------

bool recording = false;
std::string record;
struct Range {
  uintptr_t begin, end;
};
std::vector<Range> allocations;  // since recording began, in their order

// A word of a kernel's parameters: what lies in memory that was allocated since is named by its
// place there, since every run gets other addresses.
std::string word_text(uint64_t word) {
  for (size_t i = allocations.size(); i-- > 0;)
    if (allocations[i].begin <= word && word < allocations[i].end)
      return joined("new", i, word - allocations[i].begin);
  return joined(word);
}

cudaError_t launched(const void* function, dim3 grid, dim3 block, size_t shared_bytes,
                     const void* params, int attributes, const cudaLaunchAttribute* attribute) {
  if (!recording) return cudaSuccess;
  const Kernel& k = *static_cast<const Kernel*>(function);
  std::ostringstream text;
  text << k.name << "grid " << grid.x << " " << grid.y << " " << grid.z << " block " << block.x
       << " shared " << shared_bytes;
  for (int i = 0; i < attributes; ++i)
    text << " attribute " << attribute[i].id << " " << attribute[i].val.clusterDim.x;
  text << " :";
  std::vector<uint64_t> words(k.param_bytes / 8 + 1);  // zeros behind the last
  std::memcpy(words.data(), params, k.param_bytes);
  for (const uint64_t word : words) text << " " << word_text(word);
  record += text.str() + "\n";
  return cudaSuccess;
}

void note_allocation(AtenTensorHandle made) {
  if (!recording) return;
  void* data = nullptr;
  int64_t bytes = 0;
  aoti_torch_get_data_ptr(made, &data);
  aoti_torch_get_storage_size(made, &bytes);
  const auto begin = reinterpret_cast<uintptr_t>(data);
  allocations.push_back({begin, begin + uintptr_t(bytes)});
}

template <typename Function>
Function real(const char* name) {
  static void* const torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  return reinterpret_cast<Function>(dlsym(torch, name));
}

template <typename Fields>
CUresult fill_map(CUtensorMap* map, const void* base, const Fields& fields) {
  static_assert(sizeof(Fields) + sizeof base <= sizeof *map);
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &base, sizeof base);
  std::memcpy(reinterpret_cast<char*>(map) + sizeof base, &fields, sizeof fields);
  return CUDA_SUCCESS;
}

struct MapFields {
  uint32_t size[4], stride[3], walk[4], corners[4], pixels, swizzle;
};

CUresult encode(CUtensorMap* map, uint32_t rank, const void* base, const cuuint64_t* size,
                const cuuint64_t* stride, const cuuint32_t* walk, MapFields fields) {
  for (uint32_t i = 0; i < rank; ++i) fields.size[i] = uint32_t(size[i]), fields.walk[i] = walk[i];
  for (uint32_t i = 0; i + 1 < rank; ++i) fields.stride[i] = uint32_t(stride[i]);
  return fill_map(map, base, fields);
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                      const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                      const cuuint32_t* walk, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  MapFields fields{};
  for (uint32_t i = 0; i < rank; ++i) fields.corners[i] = box[i];
  fields.swizzle = swizzle;
  return encode(map, rank, base, size, stride, walk, fields);
}

CUresult encode_im2col(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base,
                       const cuuint64_t* size, const cuuint64_t* stride, const int* lower,
                       const int* upper, cuuint32_t channels, cuuint32_t pixels,
                       const cuuint32_t* walk, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  MapFields fields{};
  for (int i = 0; i < 2; ++i) {
    fields.corners[i] = uint32_t(lower[i]);
    fields.corners[2 + i] = uint32_t(upper[i]);
  }
  fields.pixels = pixels << 16 | channels;
  fields.swizzle = swizzle;
  return encode(map, rank, base, size, stride, walk, fields);
}

}  // namespace

extern "C" {

// ---- for the tests
// -------------------------------------------------------------------------------

__attribute__((visibility("default"))) void null_device_record() {
  recording = true;
  record.clear();
  allocations.clear();
}
__attribute__((visibility("default"))) const char* null_device_launches() {
  recording = false;
  return record.c_str();
}

// ---- the CUDA runtime
// ----------------------------------------------------------------------------

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the null device"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount                ? 132  // an H100
           : which == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 << 10
           : which == cudaDevAttrComputeCapabilityMajor           ? 9
                                                                  : 0;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) {
  return *count = 1, cudaSuccess;  // of any size
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::calloc(bytes, 1);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t, cudaGraphNodeType* type) {
  return *type = cudaGraphNodeTypeKernel, cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned int,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *found = std::strstr(name, "Im2col") ? reinterpret_cast<void*>(&encode_im2col)
                                       : reinterpret_cast<void*>(&encode_tiled);
  return *result = cudaDriverEntryPointSuccess, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  return launched(function, grid, block, shared_bytes, arguments[0], 0, nullptr);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  return launched(function, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                  arguments[0], int(config->numAttrs), config->attrs);
}

// ---- torch, for which the CPU is the GPU
// ---------------------------------------------------------

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  return *stream = nullptr, AOTI_TORCH_SUCCESS;
}
int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  return *index = 0, AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  return *guard = nullptr, AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t type, int32_t,
                                        AtenTensorHandle* made) {
  static const auto empty = real<decltype(&aoti_torch_empty_strided)>("aoti_torch_empty_strided");
  const AOTITorchError error = empty(dim, sizes, strides, dtype, type, -1, made);
  if (error == AOTI_TORCH_SUCCESS) note_allocation(*made);
  return error;
}
AOTITorchError torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                     uint64_t version) {
  static const auto call = real<decltype(&torch_call_dispatcher)>("torch_call_dispatcher");
  const AOTITorchError error = call(op, overload, stack, version);
  if (error == AOTI_TORCH_SUCCESS && !std::strcmp(op, "aten::new_empty"))
    note_allocation(reinterpret_cast<AtenTensorHandle>(stack[0]));
  return error;
}
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* key, const char* file,
                                            uint32_t line, TorchLibraryHandle* made) {
  static const auto init =
      real<decltype(&aoti_torch_library_init_impl)>("aoti_torch_library_init_impl");
  return init(ns, std::strcmp(key, "CUDA") ? key : "CPU", file, line, made);
}
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name,
                                  void (*function)(StableIValue*, uint64_t, uint64_t),
                                  uint64_t version) {
  // The CPU has kernels of its own for these.
  static const std::set<std::string> taken{"global_avg_pool", "linear"};
  static const auto impl = real<decltype(&torch_library_impl)>("torch_library_impl");
  return taken.count(name) ? AOTI_TORCH_SUCCESS : impl(library, name, function, version);
}

}  // extern "C"

// ---- the kernels' addresses
// ----------------------------------------------------------------------

#define NAMED(name, params) \
  const void* name() { return kernel(#name " ", params); }
#define BY_TILE(family, name, params) \
  const void* name(int tile) { return kernel(joined(family, #name, tile), params); }

namespace resnet_fused::sm80 {

#define CONVOLUTION(name)                                                       \
  const void* name(int tile, bool shortcut) {                                   \
    return kernel(joined("sm80", #name, tile, shortcut), sizeof(KernelParams)); \
  }
CONVOLUTION(kernel_bfloat16)
CONVOLUTION(kernel_float16)
CONVOLUTION(kernel_tf32)
CONVOLUTION(kernel_float32)
BY_TILE("sm80", stem_bfloat16, sizeof(StemParams))
BY_TILE("sm80", stem_float16, sizeof(StemParams))
BY_TILE("sm80", tail_bfloat16, sizeof(TailParams))
BY_TILE("sm80", tail_float16, sizeof(TailParams))
NAMED(add_relu_bfloat16, 0)
NAMED(add_relu_float16, 0)
NAMED(add_relu_float32, 0)
NAMED(scale_shift_bfloat16, 0)
NAMED(scale_shift_float16, 0)
NAMED(scale_shift_float32, 0)
const void* pool_kernel_of(Type type) { return kernel(joined("pool", int(type)), sizeof(Pool)); }
const void* linear_kernel_of(Type type, bool one_image) {
  return kernel(joined("linear", int(type), one_image), sizeof(Linear));
}

}  // namespace resnet_fused::sm80

namespace resnet_fused::sm90 {

#define HOPPER(name, params)                                                    \
  const void* name(int which, bool first, bool second) {                        \
    return kernel(joined("sm90", #name, which, first, second), sizeof(params)); \
  }
HOPPER(kernel_bfloat16, KernelParams)
HOPPER(kernel_float16, KernelParams)
HOPPER(tap_shift_bfloat16, TapShiftParams)
HOPPER(tap_shift_float16, TapShiftParams)
BY_TILE("sm90", stem_bfloat16, sizeof(StemParams))
BY_TILE("sm90", stem_float16, sizeof(StemParams))

}  // namespace resnet_fused::sm90
