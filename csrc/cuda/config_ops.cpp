// The configurations of conv_bn_act_cuda, without its tensors: which are compiled, which are worth
// measuring, and why one cannot serve.
#include <torch/csrc/stable/library.h>

#include <map>
#include <sstream>

#include "cuda/conv_launch.h"
#include "op/op_string.h"

namespace resnet_fused::cuda {
namespace {

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
  const Problem p = problem_of(wanted.sizes);
  std::ostringstream lines;
#ifndef RESNET_FUSED_WITHOUT_SM90
  if (sm90_refuses(wanted, facts).empty())
    for (const sm90::Choice& choice : sm90::ranked(p, sm90_device(facts)))
      lines << sm90::text(choice) << "\n";
#endif
  if (sm80::refuses(p).empty())
    for (const sm80::Choice& choice : sm80::ranked(p, wanted.type, sm80_device(facts)))
      lines << sm80::text(choice) << "\n";
  return lines.str();
}

// Empty where a configuration serves the convolution, else one sentence.
std::string refusal(const Sizes& x, int64_t out_channels, const IntPair& kernel_size,
                    const IntPair& stride, const IntPair& padding, const IntPair& dilation,
                    int64_t groups, const Sizes& shortcut_x, const IntPair& shortcut_stride,
                    StringHandle kind, [[maybe_unused]] int64_t device,
                    StringHandle config_handle) {
  const std::string config = take_string(config_handle);
  const Wanted wanted =
      wanted_of("conv_bn_act_cuda_refusal", x, out_channels, kernel_size, stride, padding, dilation,
                groups, shortcut_x, shortcut_stride, take_string(kind));
  const Problem p = problem_of(wanted.sizes);
  sm80::Choice sm80_choice;
  if (sm80::parse(config, &sm80_choice)) {
    const std::string why = sm80::refuses(p);
    return why.empty() ? sm80::refuses(p, wanted.type, sm80_choice) : why;
  }
#ifndef RESNET_FUSED_WITHOUT_SM90
  sm90::Choice sm90_choice;
  if (sm90::parse(config, &sm90_choice)) {
    const DeviceFacts& facts = device_facts(int(device));
    const std::string why = sm90_refuses(wanted, facts);
    return why.empty() ? sm90::refuses(p, sm90_choice, sm90_device(facts)) : why;
  }
#endif
  return no_config(config);
}

// One configuration a line: a name that `config` takes with a number of splits (of sm90's, only p64
// tiles with more than one), threads of a block, and bytes of shared memory.
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

}  // namespace
}  // namespace resnet_fused::cuda

// An op without a tensor argument has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("cuda_configurations", TORCH_BOX(&resnet_fused::cuda::configurations));
  m.impl("conv_bn_act_cuda_ranked", TORCH_BOX(&resnet_fused::cuda::ranked));
  m.impl("conv_bn_act_cuda_refusal", TORCH_BOX(&resnet_fused::cuda::refusal));
}
