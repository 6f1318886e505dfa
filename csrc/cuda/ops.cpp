// conv_bn_act_cuda and add_relu_cuda: from tensors to launches. Schemas, fakes, autograd and
// autocast of all ops live in resnet_fused/ops.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <sstream>

#include "cpu/op_string.h"
#include "cuda/context.h"
#include "cuda/conv_arguments.h"
#include "cuda/dense.h"
#include "cuda/kept_tickets.h"
#include "cuda/sm80/launch.h"
#ifndef RESNET_FUSED_WITHOUT_SM90
#include "cuda/sm90/launch.h"
#endif

namespace resnet_fused::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// Whether float32 may be multiplied as TF32: torch's own flag for convolutions, which only Python
// can read in a way that stays.
bool uses_tf32() {
  StableIValue stack[1] = {0};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("resnet_fused::uses_tf32", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

sm80::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return sm80::Type::kBFloat16;
    case ScalarType::Half:
      return sm80::Type::kFloat16;
    default:
      return uses_tf32() ? sm80::Type::kTf32 : sm80::Type::kFloat32;
  }
}

// A convolution whose tensors are dense, and what its kernels take of it.
struct Call {
  const std::string& config;
  const DeviceFacts& facts;
  CUstream_st* stream;
  const ConvArguments& a;
  Tensor y, x, packed;
  std::optional<Tensor> residual, shortcut_x, shortcut_packed;
  Tensor scale, shift;
  std::optional<Tensor> shortcut_scale, shortcut_shift;
};

template <typename Problem>
Problem problem_of(const Call& call) {
  const ConvArguments& a = call.a;
  Problem p{};
  p.n = int(call.x.size(0));
  p.c = int(call.x.size(1));
  p.h = int(call.x.size(2));
  p.w = int(call.x.size(3));
  p.k = int(a.scale.numel());
  p.r = int(a.kernel_size[0]);
  p.s = int(a.kernel_size[1]);
  p.stride_h = int(a.stride[0]);
  p.stride_w = int(a.stride[1]);
  p.pad_h = int(a.padding[0]);
  p.pad_w = int(a.padding[1]);
  p.dilation_h = int(a.dilation[0]);
  p.dilation_w = int(a.dilation[1]);
  p.shortcut_stride_h = p.shortcut_stride_w = 1;
  if (call.shortcut_x) {
    p.shortcut_c = int(call.shortcut_x->size(1));
    p.shortcut_h = int(call.shortcut_x->size(2));
    p.shortcut_w = int(call.shortcut_x->size(3));
    p.shortcut_stride_h = int(a.shortcut_stride[0]);
    p.shortcut_stride_w = int(a.shortcut_stride[1]);
  }
  return p;
}
template <typename Operands>
Operands operands_of(const Call& call) {
  Operands o{};
  o.relu = call.a.act == "relu";
  o.x = pointer(call.x);
  o.weight = pointer(call.packed);
  o.shortcut_x = pointer(call.shortcut_x);
  o.shortcut_weight = pointer(call.shortcut_packed);
  o.scale = floats(call.scale);
  o.shift = floats(call.shift);
  o.shortcut_scale = floats(call.shortcut_scale);
  o.shortcut_shift = floats(call.shortcut_shift);
  o.residual = pointer(call.residual);
  o.y = call.y.mutable_data_ptr();
  return o;
}

// Split-K's workspace. The sums are the caching allocator's, so that their memory is the stream's
// until the kernel has run, and part of a graph that captures it; so are tickets that are not kept.
struct Workspace {
  Tensor memory;
  float* partial;
  uint32_t* tickets;  // zero
};
// Empty, or why the tickets could not be cleared.
std::string workspace(const Call& call, int64_t partial_floats, int64_t tickets,
                      std::optional<Workspace>* made) {
  static KeptTickets kept;
  uint32_t* zeros = nullptr;
  if (runs_in_order(call.stream))
    zeros = kept.get(call.x.get_device_index(), call.stream, tickets,
                     [&](int64_t count) { return new_zeros(count, call.stream); });
  const int64_t own = zeros ? 0 : tickets;
  Tensor memory = torch::stable::new_empty(call.x, {partial_floats + own}, ScalarType::Float);
  float* const partial = static_cast<float*>(memory.mutable_data_ptr());
  if (!zeros) zeros = reinterpret_cast<uint32_t*>(partial + partial_floats);
  *made = Workspace{memory, partial, zeros};
  return own ? clear(zeros, own, call.stream) : "";
}

std::string run_sm80(const Call& call, sm80::Choice* named) {
  sm80::Problem p = problem_of<sm80::Problem>(call);
  p.groups = int(call.a.groups);
  const std::string why = sm80::refuses(p);
  if (!why.empty()) return why;
  const sm80::Type type = type_of(call.x);
  const sm80::Device device{call.facts.multiprocessors, call.facts.shared_bytes};
  const sm80::Choice choice = named ? *named : sm80::choose(p, type, device);
  auto o = operands_of<sm80::Operands>(call);
  const sm80::Workspace need = sm80::refuses(p, type, choice).empty()
                                   ? sm80::workspace_of(p, type, choice)
                                   : sm80::Workspace{0, 0};
  std::optional<Workspace> memory;
  if (need.tickets) {
    const std::string failed = workspace(call, need.partial_floats, need.tickets, &memory);
    if (!failed.empty()) return failed;
    o.partial = memory->partial;
    o.tickets = memory->tickets;
  }
  return sm80::launch(p, type, choice, o, call.stream);
}

#ifndef RESNET_FUSED_WITHOUT_SM90
// Whether the sm_90a kernel can serve a call that names no configuration.
bool suits_sm90(const Call& call) {
  return call.facts.major == 9 && call.facts.minor == 0 && call.a.groups == 1 &&
         call.a.x.scalar_type() != ScalarType::Float &&
         sm90::refuses(problem_of<sm90::Problem>(call)).empty();
}
std::string run_sm90(const Call& call, sm90::Choice* named) {
  const sm90::Problem p = problem_of<sm90::Problem>(call);
  if (call.facts.major != 9 || call.facts.minor != 0) return "its kernel is for sm_90";
  if (call.a.x.scalar_type() == ScalarType::Float) return "its kernel has no float32";
  if (call.a.groups != 1) return "its kernel has no groups";
  const sm90::Device device{call.facts.multiprocessors};
  const std::string why = sm90::refuses(p);
  if (!why.empty()) return why;
  const sm90::Choice choice = named ? *named : sm90::choose(p, device);
  const std::string refused = sm90::refuses(p, choice);
  if (!refused.empty()) return refused;
  auto o = operands_of<sm90::Operands>(call);
  o.bfloat16 = call.a.x.scalar_type() == ScalarType::BFloat16;
  const int64_t tickets = sm90::tickets(p, choice);
  std::optional<Workspace> memory;
  if (tickets) {
    const std::string failed = workspace(call, sm90::partial_floats(p, choice), tickets, &memory);
    if (!failed.empty()) return failed;
    o.partial = memory->partial;
    o.tickets = memory->tickets;
  }
  return sm90::launch(p, choice, o, device, call.stream);
}
#endif

std::string run(const Call& call) {
  sm80::Choice sm80_choice;
  if (sm80::parse(call.config, &sm80_choice)) return run_sm80(call, &sm80_choice);
#ifndef RESNET_FUSED_WITHOUT_SM90
  sm90::Choice sm90_choice;
  if (sm90::parse(call.config, &sm90_choice)) return run_sm90(call, &sm90_choice);
  if (call.config.empty() && suits_sm90(call)) return run_sm90(call, nullptr);
#endif
  if (call.config.empty()) return run_sm80(call, nullptr);
  return "config must be empty or like \"sm80 64x64 split 1\", got \"" + call.config + "\"";
}

void check_indices(const Sizes& sizes, const char* name) {
  int64_t count = 1;
  for (const int64_t size : sizes)
    check(!__builtin_mul_overflow(count, size, &count) && count < (int64_t{1} << 31),
          "conv_bn_act_cuda: ", name, " must have fewer than 2**31 elements, got shape ",
          shape_text(sizes));
}

Tensor conv_bn_act(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& shift,
                   const MaybeTensor& residual, const MaybeTensor& shortcut_x,
                   const MaybeTensor& shortcut_packed, const MaybeTensor& shortcut_scale,
                   const MaybeTensor& shortcut_shift, const IntPair& kernel_size,
                   const IntPair& stride, const IntPair& padding, const IntPair& dilation,
                   int64_t groups, StringHandle act_handle, const IntPair& shortcut_stride,
                   StringHandle config_handle) {
  const std::string act = take_string(act_handle), config = take_string(config_handle);
  const ConvArguments a{"conv_bn_act_cuda",
                        x,
                        packed,
                        scale,
                        shift,
                        residual,
                        shortcut_x,
                        shortcut_packed,
                        shortcut_scale,
                        shortcut_shift,
                        kernel_size,
                        stride,
                        padding,
                        dilation,
                        groups,
                        act,
                        shortcut_stride};
  const Sizes out = check_arguments(a);
  check_indices(out, "the output");
  const int device = x.get_device_index();
  const DeviceGuard guard(device);
  const Tensor y = empty_nhwc(x, out);
  const bool batched = x.dim() == 4;
  if (y.numel() > 0) {
    const auto sizes = [](const Tensor& t) {
      const auto all = t.sizes();
      return Sizes(all.begin(), all.end());
    };
    check_indices(sizes(x), "x");
    check_indices(sizes(packed), "packed");
    if (shortcut_x) check_indices(sizes(*shortcut_x), "shortcut_x");
    const Call call{config,
                    device_facts(device),
                    current_stream(device),
                    a,
                    y,
                    dense_image(x),
                    dense_image(packed),
                    dense_image(residual),
                    dense_image(shortcut_x),
                    dense_image(shortcut_packed),
                    dense_vector(scale),
                    dense_vector(shift),
                    dense_vector(shortcut_scale),
                    dense_vector(shortcut_shift)};
    const std::string failed = run(call);
    check(failed.empty(), "conv_bn_act_cuda: ", failed);
  }
  return batched ? y : torch::stable::squeeze(y, 0);
}

// One configuration a line: a name that `config` takes with any number of splits, threads of a
// block, and bytes of shared memory.
std::string configurations() {
  std::ostringstream text;
  for (const sm80::NamedTile& named : sm80::kTiles)
    text << "sm80 " << named.name << " " << sm80::threads(named.tile) << " "
         << sm80::shared_bytes(named.tile) << "\n";
#ifndef RESNET_FUSED_WITHOUT_SM90
  for (const sm90::NamedTile& named : sm90::kTiles)
    text << "sm90 " << named.name << " " << 128 * (1 + named.tile.consumers) << " "
         << sm90::shared_bytes(named.tile) << "\n";
#endif
  return text.str();
}

// ---- add_relu -----------------------------------------------------------------------------------

Tensor with_layout(const Tensor& tensor, const Tensor& like) {
  bool same = true;
  for (int64_t d = 0; d < tensor.dim(); ++d)
    same &= tensor.size(d) == 1 || tensor.stride(d) == like.stride(d);
  if (same) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor add_relu(const Tensor& a, const Tensor& b) {
  const char* const op = "add_relu_cuda";
  const ScalarType type = a.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
        ": a must be float32, bfloat16 or float16, got ", dtype_name(type));
  check_shape(b, a.sizes(), op, "b");
  check_dtype(b, type, op, "b");
  const int device = a.get_device_index();
  check(b.is_cuda() && b.get_device_index() == device, op, ": b must be on cuda:", device,
        ", where a is, got another device");
  if (a.numel() == 0) return torch::stable::new_empty(a, a.sizes());
  const DeviceGuard guard(device);
  const Tensor y = torch::stable::empty_like(a);  // dense, in a's order of dimensions
  const Tensor left = with_layout(a, y), right = with_layout(b, y);
  const sm80::Type kind = type == ScalarType::BFloat16 ? sm80::Type::kBFloat16
                          : type == ScalarType::Half   ? sm80::Type::kFloat16
                                                       : sm80::Type::kFloat32;
  const DeviceFacts& facts = device_facts(device);
  const std::string failed = sm80::launch_add_relu(
      kind, left.const_data_ptr(), right.const_data_ptr(), y.mutable_data_ptr(), y.numel(),
      {facts.multiprocessors, facts.shared_bytes}, current_stream(device));
  check(failed.empty(), op, ": ", failed);
  return y;
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("conv_bn_act_cuda", TORCH_BOX(&resnet_fused::cuda::conv_bn_act));
  m.impl("add_relu_cuda", TORCH_BOX(&resnet_fused::cuda::add_relu));
}

// An op without a tensor argument has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("cuda_configurations", TORCH_BOX(&resnet_fused::cuda::configurations));
}
