"""The schemas of all ops."""

from __future__ import annotations

import torch

NAMESPACE = "resnet_fused"
library = torch.library.Library(NAMESPACE, "DEF")

_CONV_KEYWORDS = (
    'int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, str act="relu"'
)
_LISTS = (
    "int[] kernel_sizes, int[] strides, int[] paddings, int[] dilations, int[] groups, str[] acts"
)
_BLOCK_KEYWORDS = f"{_LISTS}, str[] plans, bool has_shortcut"
_GPU_CONV = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor shift, Tensor? residual=None, "
    "Tensor? shortcut_x=None, Tensor? shortcut_packed=None, Tensor? shortcut_scale=None, "
    f"Tensor? shortcut_shift=None, *, int[2] kernel_size, {_CONV_KEYWORDS}, "
    'int[2] shortcut_stride=1, str config="") -> Tensor'
)
_SCHEMAS = (
    f"conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual=None, *, "
    f"{_CONV_KEYWORDS}) -> Tensor",
    "add_relu(Tensor a, Tensor b) -> Tensor",
    "pack_conv(Tensor weight, int groups=1, *, str plan) -> Tensor",
    f"conv_bn_act_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    f"Tensor? residual=None, *, int[2] kernel_size, {_CONV_KEYWORDS}, str plan, "
    f"bool pool=False) -> Tensor",
    f"conv_bn_act_kept(Tensor x, Tensor weight, Tensor scale, Tensor shift, "
    f"Tensor? residual=None, *, {_CONV_KEYWORDS}, str plan, bool pool=False) -> Tensor",
    f"conv_bn_act_triton{_GPU_CONV}",
    f"conv_bn_act_cuda{_GPU_CONV}",
    "conv_bn_act_pool_cuda(Tensor x, Tensor packed, Tensor scale, Tensor shift, *, "
    'int[2] kernel_size, int[2] stride=1, int[2] padding=0, str act="relu") -> Tensor',
    "bottleneck_tail_cuda(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    "Tensor last_packed, Tensor last_scale, Tensor last_shift, Tensor? residual=None, *, "
    "int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
    'str act="relu", str last_act="relu") -> Tensor',
    "add_relu_triton(Tensor a, Tensor b) -> Tensor",
    "add_relu_cuda(Tensor a, Tensor b) -> Tensor",
    "scale_shift_act_cuda(Tensor x, Tensor scale, Tensor shift, Tensor? residual=None, *, "
    'str act="relu") -> Tensor',
    "residual_block(Tensor x, Tensor[] packed, Tensor[] scales, Tensor[] shifts, *, "
    f"{_BLOCK_KEYWORDS}) -> Tensor",
    "prepare(Tensor x, Tensor[] packed, Tensor[] scales, Tensor[] shifts, *, "
    f"{_BLOCK_KEYWORDS}, bool adds, bool pool) -> int",
    "prepare_chain(Tensor x, int[] prepared, *, bool pools, Tensor[] linear) -> int?",
    "run_prepared(Tensor x, int prepared, Tensor[] linear) -> Tensor",
    "prepare_cuda(Tensor x, Tensor[] packed, Tensor[] scales, Tensor[] shifts, *, "
    f"{_LISTS}, str[] configs, bool has_shortcut, bool joined, bool adds, bool pool) -> int",
    "run_prepared_cuda(Tensor x, int prepared) -> Tensor",
    "global_avg_pool(Tensor x) -> Tensor",
    "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    "content_sample(Tensor[] tensors) -> Tensor",
    "content_equal(Tensor[] tensors, Tensor sample) -> bool",
    "content_hash(Tensor[] tensors) -> int",
    "cpu_isa() -> str",
    "set_cpu_isa(str isa) -> ()",
    "cpu_features() -> str",
    "drop_output_memory() -> ()",
    'multiply_peak(float seconds, str dtype="float32") -> float',
    "read_words(Tensor[] tensors) -> int",
    "set_block_budget(int bytes) -> ()",
)
for _schema in _SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

# Read by the C++ kernel for float32: torch's flag has no stable place in C++.
library.define("uses_tf32() -> bool")
library.define("cuda_configurations() -> str")
# Configurations of conv_bn_act_cuda for a convolution on a GPU, by its index: those that are worth
# measuring, a line each; and why one cannot serve, "" where it can. x, shortcut_x: (N, C, H, W),
# the latter empty without a shortcut; kind: bfloat16, float16, tf32 or float32.
_SIZES = (
    "int[] x, int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, int[] shortcut_x, int[2] shortcut_stride, str kind, int device"
)
library.define(f"conv_bn_act_cuda_ranked({_SIZES}) -> str")
library.define(f"conv_bn_act_cuda_refusal({_SIZES}, str config) -> str")
# Why the binary's kernels cannot be loaded on a device, by its index; "" where they can.
library.define("cuda_image_error(int device) -> str")
# Why conv_bn_act_pool_cuda cannot serve an x of these sizes, (N, C, H, W); "" where it can.
library.define(
    "conv_bn_act_pool_refusal(int[] x, int out_channels, int[2] kernel_size, int[2] stride, "
    "int[2] padding) -> str"
)

# The same for bottleneck_tail_cuda; between: channels of the map between its convolutions.
library.define(
    "bottleneck_tail_refusal(int[] x, int between, int out_channels, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation) -> str"
)
