"""Argument checks, shapes and layouts of results: what fakes and ops in Python share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import check

_PANEL = 32  # output channels of a panel, csrc/cpu/direct.h
# Products of a tile, csrc/cpu/winograd_points.h.
_WINOGRAD_POINTS = {
    "winograd4": 36,
    "winograd2": 16,
    "winograd5": 49,
    "winograd4s2": 81,
    "winograd2s2": 25,
}
_STEM_ROWS = 13  # transformed rows, csrc/cpu/stem.h


def empty_nhwc(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty (..., C, H, W) tensor that lies in memory as (..., H, W, C)."""
    *batch, channels, height, width = shape
    return like.new_empty((*batch, height, width, channels)).movedim(-1, -3)


def as_runtime_error(checker: Callable, *args: Any) -> Any:
    """Direct torch.ops calls raise RuntimeError everywhere, as C++ kernels must."""
    try:
        return checker(*args)
    except (ValueError, TypeError) as error:
        raise RuntimeError(str(error)) from None


def dense_nhwc(tensor: Tensor) -> Tensor:
    """The tensor itself if it lies so in memory, else a copy that does; 3-D or 4-D."""
    if tensor.dim() == 4 and is_nhwc(tensor):
        return tensor
    out = empty_nhwc(tensor, tuple(tensor.shape))
    return tensor if tensor.stride() == out.stride() else out.copy_(tensor)


def is_nhwc(tensor: Tensor) -> bool:
    """Whether a (N, C, H, W) tensor lies dense in memory as (N, H, W, C)."""
    _, channels, height, width = tensor.shape
    return tensor.stride() == (channels * height * width, 1, width * channels, channels)


def empty_in_format(tensor: Tensor) -> Tensor:
    """An empty tensor in this one's format; contiguous where there is no element.

    For those torch.empty_like does one thing to real tensors and another to fake ones.
    """
    numel = tensor.numel()
    empty = isinstance(numel, int) and numel == 0
    return tensor.new_empty(tensor.shape) if empty else torch.empty_like(tensor)


def packed_shape(weight_shape: tuple[int, ...], groups: int, plan: str) -> tuple[int, ...]:
    """The shape of pack_conv's result, csrc/cpu/plan.h; a last 2 where words hold pairs."""
    out_channels, group_in, kernel_h, kernel_w = weight_shape
    if plan in check.PLAIN_LAYOUT:
        return weight_shape
    panels = -(-(out_channels // groups) // _PANEL)
    algorithm = plan.removesuffix("_bf16")
    pack = 1 if algorithm == plan else 2
    words = -(-group_in // pack)
    if algorithm in _WINOGRAD_POINTS:
        shape = (panels, _WINOGRAD_POINTS[algorithm], words, _PANEL)
    elif plan == "winograd4_raw":
        shape = (panels, group_in, kernel_h * kernel_w, _PANEL)
    elif plan == "stem":
        shape = (panels, _STEM_ROWS, kernel_w * group_in, _PANEL)
    else:
        shape = (groups * panels, kernel_h * kernel_w * words, _PANEL)
    return shape if pack == 1 else (*shape, pack)


def packed_dtype(plan: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of pack_conv's result for computing in `dtype`."""
    if plan in check.PLAIN_LAYOUT:
        return dtype
    return torch.bfloat16 if plan.endswith("_bf16") else torch.float32


def check_pack(weight: Any, groups: Any, plan: Any) -> None:
    op = "pack_conv"
    check.conv_weight(op, weight)
    check.group_count(op, groups, None, weight.shape[0])
    check.one_of(op, "plan", plan, check.plans_of(weight.device.type))
    check.plan_weight(op, plan, weight.dtype, weight.shape[2:], groups)


def check_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    act: str,
    plan: str,
    pool: bool = False,
    op: str = "conv_bn_act_packed",
) -> tuple[int, ...]:
    check.image(op, "x", x)
    check.channel_vector(op, "scale", scale)
    kernel = check.pair(op, "kernel_size", kernel_size, 1)
    check.group_count(op, groups, x.shape[-3], scale.shape[0])
    check.one_of(op, "plan", plan, check.plans_of(x.device.type))
    check.plan_weight(op, plan, x.dtype, kernel, groups, stride, dilation)
    weight_shape = (scale.shape[0], x.shape[-3] // groups, *kernel)
    check.shape(op, "packed", packed, packed_shape(weight_shape, groups, plan))
    check.like(op, "packed", packed, x, packed_dtype(plan, x.dtype))
    *rest, height, width = check.conv_args(
        op, x, weight_shape, scale, shift, residual, stride, padding, dilation, groups, act
    )
    if pool:
        height, width = check.pooled_size(height), check.pooled_size(width)
    return (*rest, height, width)


def check_gpu_conv(
    op: str,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    shortcut: Sequence[Tensor | None],
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    act: str,
    shortcut_stride: Any,
) -> tuple[int, ...]:
    """Checks conv_bn_act_triton's and conv_bn_act_cuda's arguments; returns the output's shape.

    shortcut: x, packed weights, scale and shift of the 1x1 convolution that is added, or all None.
    """
    check.image(op, "x", x)
    if x.dtype == torch.float64:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16, got float64")
    check.channel_vector(op, "scale", scale)
    kernel = check.pair(op, "kernel_size", kernel_size, 1)
    check.group_count(op, groups, x.shape[-3], scale.shape[0])
    weight_shape = (scale.shape[0], x.shape[-3] // groups, *kernel)
    check.shape(op, "packed", packed, weight_shape)
    check.like(op, "packed", packed, x, x.dtype)
    result = check.conv_args(
        op, x, weight_shape, scale, shift, residual, stride, padding, dilation, groups, act
    )
    if any(t is not None for t in shortcut):
        _check_gpu_shortcut(op, x, scale, residual, shortcut, groups, shortcut_stride, result)
    return result


def _check_gpu_shortcut(
    op: str,
    x: Tensor,
    scale: Tensor,
    residual: Tensor | None,
    shortcut: Sequence[Tensor | None],
    groups: int,
    stride: Any,
    result: tuple[int, ...],
) -> None:
    names = ("shortcut_x", "shortcut_packed", "shortcut_scale", "shortcut_shift")
    for name, value in zip(names, shortcut, strict=True):
        check.tensor(op, name, value)
    if residual is not None:
        raise ValueError(f"{op}: residual must be None beside a shortcut, got a tensor")
    if groups != 1:
        raise ValueError(f"{op}: groups must be 1 beside a shortcut, got {groups}")
    branch, packed, branch_scale, branch_shift = shortcut
    check.image(op, "shortcut_x", branch)
    check.like(op, "shortcut_x", branch, x, x.dtype)
    check.shape(op, "shortcut_packed", packed, (scale.shape[0], branch.shape[-3], 1, 1))
    check.like(op, "shortcut_packed", packed, x, x.dtype)
    for name, value in (("shortcut_scale", branch_scale), ("shortcut_shift", branch_shift)):
        check.like(op, name, value, x, torch.float32)
        check.shape(op, name, value, tuple(scale.shape))
    stride = check.pair(op, "shortcut_stride", stride, 1)
    size = check.output_size(op, branch.shape[-2:], (1, 1), stride, (0, 0), (1, 1))
    found = (*branch.shape[:-3], scale.shape[0], *size)
    if found != result:
        raise ValueError(
            f"{op}: the shortcut's output must have the convolution's shape {result}, got {found}"
        )


def check_kept(
    x: Any,
    weight: Any,
    scale: Any,
    shift: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    act: Any,
    plan: Any,
    pool: bool,
) -> tuple[int, ...]:
    op = "conv_bn_act_kept"
    *rest, height, width = check.conv_bn_act(
        op, x, weight, scale, shift, residual, stride, padding, dilation, groups, act
    )
    check.one_of(op, "plan", plan, check.plans_of(x.device.type))
    check.plan_weight(op, plan, x.dtype, weight.shape[2:], groups, stride, dilation)
    if pool:
        height, width = check.pooled_size(height), check.pooled_size(width)
    return (*rest, height, width)


_PER_CONV = {
    "scales": 1,
    "shifts": 1,
    "kernel_sizes": 2,
    "strides": 2,
    "paddings": 2,
    "dilations": 2,
    "groups": 1,
    "acts": 1,
    "plans": 1,
}


def block_convs(has_shortcut: bool, packed: list[Tensor], **lists: list) -> list[dict[str, Any]]:
    """residual_block's lists as the arguments of check_packed and conv_bn_act_packed, for each
    convolution."""
    op, count, least = "residual_block", len(packed), 2 if has_shortcut else 1
    if count < least:
        raise ValueError(
            f"{op}: packed must have at least {least} convolution{'s' * (least - 1)}, got {count}"
        )
    for name, each in _PER_CONV.items():
        if len(lists[name]) != each * count:
            words = {1: "one", 2: "two"}[each]
            raise ValueError(
                f"{op}: {name} must have {words} for each of the {count} convolutions, "
                f"got {len(lists[name])}"
            )
    convs = []
    for i in range(count):
        conv = {"packed": packed[i]}
        for name, each in _PER_CONV.items():
            values = lists[name]
            singular = name if name == "groups" else name.removesuffix("s")
            conv[singular] = values[i] if each == 1 else tuple(values[2 * i : 2 * i + 2])
        convs.append(conv)
    return convs


def check_block(x: Tensor, convs: list[dict[str, Any]], has_shortcut: bool) -> tuple[int, ...]:
    """Checks residual_block's convolutions, as block_convs gives them; returns its output's shape.

    convs: the main path's in order, then the shortcut's if has_shortcut.
    """
    op = "residual_block"
    check.image(op, "x", x)

    def output(i: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        # As good as a tensor of that shape, without its memory.
        image = x if i == 0 else x.new_empty((1,) * len(shape)).expand(shape)
        return check_packed(image, residual=None, op=f"{op}: convolution {i}", **convs[i])

    main = shortcut = tuple(x.shape)
    for i in range(len(convs) - has_shortcut):
        main = output(i, main)
    if has_shortcut:
        shortcut = output(len(convs) - 1, shortcut)
    if shortcut != main:
        what = "the shortcut's output" if has_shortcut else "x, added as it is,"
        raise ValueError(f"{op}: {what} must have the main path's shape {main}, got {shortcut}")
    return main
