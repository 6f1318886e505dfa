// Plans: which kernel runs a convolution, and with it the layout of the packed weights.
#pragma once

#include <string>
#include <vector>

#include "check.h"
#include "conv.h"
#include "cpu/direct.h"
#include "cpu/winograd.h"

namespace resnet_fused {

enum class Plan { kDirect, kWinograd4, kWinograd2, kTorch };

inline Plan parse_plan(const char* op, const std::string& name) {
  if (name == "direct") return Plan::kDirect;
  if (name == "winograd4") return Plan::kWinograd4;
  if (name == "winograd2") return Plan::kWinograd2;
  if (name == "torch") return Plan::kTorch;
  fail(op, ": plan must be \"direct\" or \"winograd4\" or \"winograd2\" or \"torch\", got \"", name,
       "\"");
}

inline const char* plan_name(Plan plan) {
  switch (plan) {
    case Plan::kDirect:
      return "direct";
    case Plan::kWinograd4:
      return "winograd4";
    case Plan::kWinograd2:
      return "winograd2";
    case Plan::kTorch:
      return "torch";
  }
  return "";
}

// Output pixels of a Winograd tile's side.
inline int64_t winograd_tile(Plan plan) { return plan == Plan::kWinograd4 ? 4 : 2; }

inline std::vector<int64_t> packed_shape(Plan plan, const ConvShape& s) {
  switch (plan) {
    case Plan::kTorch:
      return {s.out_channels, s.group_in(), s.kernel_h, s.kernel_w};
    case Plan::kDirect:
      return {s.groups * panels_of(s.group_out()), s.reduction(), kPanel};
    default:
      return {panels_of(s.out_channels), winograd_points(winograd_tile(plan)), s.in_channels,
              kPanel};
  }
}

inline void check_plan_dtype(const char* op, Plan plan, DType dtype) {
  check(dtype != DType::kFloat64, op, ": plan \"", plan_name(plan),
        "\" takes float32, bfloat16 or float16, got float64");
}

// What the plan demands of the weights, checked when they are packed and when they are used.
inline void check_plan_weight(const char* op, Plan plan, const ConvShape& s) {
  if (plan != Plan::kWinograd4 && plan != Plan::kWinograd2) return;
  check(s.kernel_h == 3 && s.kernel_w == 3 && s.groups == 1, op, ": plan \"", plan_name(plan),
        "\" takes 3 x 3 kernels in one group, got ", s.kernel_h, " x ", s.kernel_w, " in ",
        s.groups);
}

inline void check_plan_geometry(const char* op, Plan plan, const ConvShape& s) {
  if (plan != Plan::kWinograd4 && plan != Plan::kWinograd2) return;
  check(s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1, op,
        ": plan \"", plan_name(plan), "\" takes stride 1 and dilation 1, got stride ",
        shape_text(std::vector<int64_t>{s.stride_h, s.stride_w}), " and dilation ",
        shape_text(std::vector<int64_t>{s.dilation_h, s.dilation_w}));
}

}  // namespace resnet_fused
