// conv_bn_act_cuda and add_relu_cuda: from tensors to launches. Schemas, fakes, autograd and
// autocast of all ops live in resnet_fused/ops.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <map>
#include <sstream>

#include "cpu/op_string.h"
#include "cuda/context.h"
#include "cuda/conv_arguments.h"
#include "cuda/conv_problem.h"
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

// What kernels are chosen by.
struct Wanted {
  ConvSizes sizes;
  sm80::Type type;
};

// A convolution whose tensors are dense, and what its kernels take of it.
struct Call {
  const std::string& config;
  Wanted wanted;
  const DeviceFacts& facts;
  CUstream_st* stream;
  const ConvArguments& a;
  Tensor y, x, packed;
  std::optional<Tensor> residual, shortcut_x, shortcut_packed;
  Tensor scale, shift;
  std::optional<Tensor> shortcut_scale, shortcut_shift;
};

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

sm80::Device sm80_device(const DeviceFacts& facts) {
  return {facts.multiprocessors, facts.shared_bytes};
}

std::string run_sm80(const Call& call, const sm80::Choice* named) {
  const auto p = problem_of<sm80::Problem>(call.wanted.sizes);
  const std::string why = sm80::refuses(p);
  if (!why.empty()) return why;
  const sm80::Type type = call.wanted.type;
  const sm80::Choice choice = named ? *named : sm80::choose(p, type, sm80_device(call.facts));
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
// Empty where the sm_90a kernel can serve, else one sentence.
std::string sm90_refuses(const Wanted& wanted, const DeviceFacts& facts) {
  if (facts.major != 9 || facts.minor != 0) return "its kernel is for sm_90";
  if (sm80::element_bytes(wanted.type) == 4) return "its kernel has no float32";
  if (wanted.sizes.groups != 1) return "its kernel has no groups";
  return sm90::refuses(problem_of<sm90::Problem>(wanted.sizes));
}
std::string run_sm90(const Call& call, const sm90::Choice* named) {
  const std::string why = sm90_refuses(call.wanted, call.facts);
  if (!why.empty()) return why;
  const auto p = problem_of<sm90::Problem>(call.wanted.sizes);
  const sm90::Device device{call.facts.multiprocessors};
  const sm90::Choice choice = named ? *named : sm90::choose(p, device);
  const std::string refused = sm90::refuses(p, choice);
  if (!refused.empty()) return refused;
  auto o = operands_of<sm90::Operands>(call);
  o.bfloat16 = call.wanted.type == sm80::Type::kBFloat16;
  return sm90::launch(p, choice, o, device, call.stream);
}
#endif

std::string no_config(const std::string& text) {
  return "config must be empty or like \"sm80 64x64 split 1\", got \"" + text + "\"";
}

std::string run(const Call& call) {
  sm80::Choice sm80_choice;
  if (sm80::parse(call.config, &sm80_choice)) return run_sm80(call, &sm80_choice);
#ifndef RESNET_FUSED_WITHOUT_SM90
  sm90::Choice sm90_choice;
  if (sm90::parse(call.config, &sm90_choice)) return run_sm90(call, &sm90_choice);
  if (call.config.empty() && sm90_refuses(call.wanted, call.facts).empty())
    return run_sm90(call, nullptr);
#endif
  return call.config.empty() ? run_sm80(call, nullptr) : no_config(call.config);
}

// ---- configurations of a convolution, without its tensors ---------------------------------------

Wanted wanted_of(const char* op, const Sizes& x, int64_t out_channels, const IntPair& kernel_size,
                 const IntPair& stride, const IntPair& padding, const IntPair& dilation,
                 int64_t groups, const Sizes& shortcut_x, const IntPair& shortcut_stride,
                 const std::string& kind) {
  check(x.size() == 4, op, ": x must be 4 sizes, got ", shape_text(x));
  check(shortcut_x.empty() || shortcut_x.size() == 4, op,
        ": shortcut_x must be 4 sizes or none, got ", shape_text(shortcut_x));
  const std::map<std::string, sm80::Type> types = {{"bfloat16", sm80::Type::kBFloat16},
                                                   {"float16", sm80::Type::kFloat16},
                                                   {"tf32", sm80::Type::kTf32},
                                                   {"float32", sm80::Type::kFloat32}};
  const auto type = types.find(kind);
  check(type != types.end(), op, ": kind must be bfloat16, float16, tf32 or float32, got ", kind);
  return {{x, out_channels, kernel_size, stride, padding, dilation, groups, shortcut_x,
           shortcut_stride},
          type->second};
}

// One configuration a line, those of the kernel that is chosen where none is named first, in the
// order of their modelled time.
std::string ranked(const Sizes& x, int64_t out_channels, const IntPair& kernel_size,
                   const IntPair& stride, const IntPair& padding, const IntPair& dilation,
                   int64_t groups, const Sizes& shortcut_x, const IntPair& shortcut_stride,
                   StringHandle kind, int64_t device) {
  const Wanted wanted =
      wanted_of("conv_bn_act_cuda_ranked", x, out_channels, kernel_size, stride, padding, dilation,
                groups, shortcut_x, shortcut_stride, take_string(kind));
  const DeviceFacts& facts = device_facts(int(device));
  std::ostringstream lines;
#ifndef RESNET_FUSED_WITHOUT_SM90
  if (sm90_refuses(wanted, facts).empty()) {
    const auto p = problem_of<sm90::Problem>(wanted.sizes);
    for (const sm90::Choice& choice : sm90::ranked(p, {facts.multiprocessors}))
      lines << sm90::text(choice) << "\n";
  }
#endif
  const auto p = problem_of<sm80::Problem>(wanted.sizes);
  if (sm80::refuses(p).empty())
    for (const sm80::Choice& choice : sm80::ranked(p, wanted.type, sm80_device(facts)))
      lines << sm80::text(choice) << "\n";
  return lines.str();
}

// Empty where a configuration serves the convolution, else one sentence.
std::string refusal(const Sizes& x, int64_t out_channels, const IntPair& kernel_size,
                    const IntPair& stride, const IntPair& padding, const IntPair& dilation,
                    int64_t groups, const Sizes& shortcut_x, const IntPair& shortcut_stride,
                    StringHandle kind, int64_t device, StringHandle config_handle) {
  const std::string config = take_string(config_handle);
  const Wanted wanted =
      wanted_of("conv_bn_act_cuda_refusal", x, out_channels, kernel_size, stride, padding, dilation,
                groups, shortcut_x, shortcut_stride, take_string(kind));
  sm80::Choice sm80_choice;
  if (sm80::parse(config, &sm80_choice)) {
    const auto p = problem_of<sm80::Problem>(wanted.sizes);
    const std::string why = sm80::refuses(p);
    return why.empty() ? sm80::refuses(p, wanted.type, sm80_choice) : why;
  }
#ifndef RESNET_FUSED_WITHOUT_SM90
  sm90::Choice sm90_choice;
  if (sm90::parse(config, &sm90_choice)) {
    const std::string why = sm90_refuses(wanted, device_facts(int(device)));
    if (!why.empty()) return why;
    return sm90::refuses(problem_of<sm90::Problem>(wanted.sizes), sm90_choice);
  }
#endif
  return no_config(config);
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
    check_indices(sizes_of(x), "x");
    check_indices(sizes_of(packed), "packed");
    if (shortcut_x) check_indices(sizes_of(*shortcut_x), "shortcut_x");
    const Tensor image = dense_image(x);
    const MaybeTensor branch = dense_image(shortcut_x);
    const ConvSizes sizes{
        sizes_of(image), scale.numel(), kernel_size, stride,
        padding,         dilation,      groups,      branch ? sizes_of(*branch) : Sizes{},
        shortcut_stride};
    const Call call{config,
                    {sizes, type_of(x)},
                    device_facts(device),
                    current_stream(device),
                    a,
                    y,
                    image,
                    dense_image(packed),
                    dense_image(residual),
                    branch,
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

// One configuration a line: a name that `config` takes with a number of splits (of sm90's, only p64
// tiles with more than one), threads of a
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
      sm80_device(facts), current_stream(device));
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
  m.impl("conv_bn_act_cuda_ranked", TORCH_BOX(&resnet_fused::cuda::ranked));
  m.impl("conv_bn_act_cuda_refusal", TORCH_BOX(&resnet_fused::cuda::refusal));
}
