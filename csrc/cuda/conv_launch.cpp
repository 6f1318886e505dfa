#include "cuda/conv_launch.h"

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/arguments.h"
#include "cuda/kept_tickets.h"

namespace resnet_fused::cuda {
namespace {

// Whether float32 may be multiplied as TF32: torch's own flag for convolutions, which only Python
// can read in a way that stays.
bool uses_tf32() {
  StableIValue stack[1] = {0};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("resnet_fused::uses_tf32", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// How x's elements are multiplied.
sm80::Type type_of(const char* op, const Tensor& x) {
  const sm80::Type type = check_elements(op, "x", x);
  return type == sm80::Type::kFloat32 && uses_tf32() ? sm80::Type::kTf32 : type;
}

void check_indices(const Sizes& sizes, const char* op, const char* name) {
  int64_t count = 1;
  for (const int64_t size : sizes)
    check(!__builtin_mul_overflow(count, size, &count) && count < (int64_t{1} << 31), op, ": ",
          name, " must have fewer than 2**31 elements, got shape ", shape_text(sizes));
}

// One launch: a convolution and its images, dense.
struct Call {
  const Conv& conv;
  const DeviceFacts& facts;
  CUstream_st* stream;
  Tensor y, x;
  MaybeTensor residual, shortcut_x;
};

template <typename Operands>
Operands operands_of(const Call& call) {
  Operands o{};
  o.relu = call.conv.relu;
  o.x = pointer(call.x);
  o.weight = pointer(call.conv.packed);
  o.shortcut_x = pointer(call.shortcut_x);
  o.shortcut_weight = pointer(call.conv.shortcut_packed);
  o.scale = floats(call.conv.scale);
  o.shift = floats(call.conv.shift);
  o.shortcut_scale = floats(call.conv.shortcut_scale);
  o.shortcut_shift = floats(call.conv.shortcut_shift);
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

std::string run_sm80(const Call& call, const sm80::Choice* named) {
  const Problem p = problem_of(call.conv.wanted.sizes);
  const std::string why = sm80::refuses(p);
  if (!why.empty()) return why;
  const sm80::Type type = call.conv.wanted.type;
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
std::string run_sm90(const Call& call, const sm90::Choice* named) {
  const std::string why = sm90_refuses(call.conv.wanted, call.facts);
  if (!why.empty()) return why;
  const Problem p = problem_of(call.conv.wanted.sizes);
  const sm90::Device device = sm90_device(call.facts);
  const sm90::Choice choice = named ? *named : sm90::choose(p, device);
  const std::string refused = sm90::refuses(p, choice, device);
  if (!refused.empty()) return refused;
  auto o = operands_of<sm90::Operands>(call);
  o.bfloat16 = call.conv.wanted.type == sm80::Type::kBFloat16;
  return sm90::launch(p, choice, o, device, call.stream);
}
#endif

std::string run(const Call& call) {
  sm80::Choice sm80_choice;
  if (sm80::parse(call.conv.config, &sm80_choice)) return run_sm80(call, &sm80_choice);
#ifndef RESNET_FUSED_WITHOUT_SM90
  sm90::Choice sm90_choice;
  if (sm90::parse(call.conv.config, &sm90_choice)) return run_sm90(call, &sm90_choice);
  if (call.conv.config.empty() && sm90_refuses(call.conv.wanted, call.facts).empty())
    return run_sm90(call, nullptr);
#endif
  return call.conv.config.empty() ? run_sm80(call, nullptr) : no_config(call.conv.config);
}

}  // namespace

std::string sm90_refuses([[maybe_unused]] const Wanted& wanted,
                         [[maybe_unused]] const DeviceFacts& facts) {
#ifdef RESNET_FUSED_WITHOUT_SM90
  return "its kernel was not compiled";
#else
  if (facts.major != 9 || facts.minor != 0) return "its kernel is for sm_90";
  if (sm80::element_bytes(wanted.type) == 4) return "its kernel has no float32";
  return sm90::refuses(problem_of(wanted.sizes));
#endif
}

std::string no_config(const std::string& text) {
  return "config must be empty or like \"sm80 64x64 split 1\", got \"" + text + "\"";
}

Conv conv_of(const ConvArguments& a, const Sizes& out, const std::string& config) {
  check_indices(out, a.op, "the output");
  check_indices(sizes_of(a.x), a.op, "x");
  check_indices(sizes_of(a.packed), a.op, "packed");
  if (a.shortcut_x) check_indices(sizes_of(*a.shortcut_x), a.op, "shortcut_x");
  const ConvSizes sizes{image_sizes(a.x), a.scale.numel(),
                        a.kernel_size,    a.stride,
                        a.padding,        a.dilation,
                        a.groups,         a.shortcut_x ? image_sizes(*a.shortcut_x) : Sizes{},
                        a.shortcut_stride};
  return {a.op,
          {sizes, type_of(a.op, a.x)},
          out,
          a.act == "relu",
          config,
          dense_image(a.packed),
          dense_vector(a.scale),
          dense_vector(a.shift),
          dense_image(a.shortcut_packed),
          dense_vector(a.shortcut_scale),
          dense_vector(a.shortcut_shift)};
}

Tensor launch(const Conv& conv, const Tensor& x, const MaybeTensor& residual,
              const MaybeTensor& shortcut_x) {
  const int device = x.get_device_index();
  const Call call{
      conv,           device_facts(device),  current_stream(device), empty_nhwc(x, conv.out),
      dense_image(x), dense_image(residual), dense_image(shortcut_x)};
  if (call.y.numel() == 0) return call.y;
  const std::string failed = run(call);
  check(failed.empty(), conv.op, ": ", failed);
  return call.y;
}

}  // namespace resnet_fused::cuda
