"""Argument checks, shapes and layouts of results: what fakes and fallback share."""

from __future__ import annotations

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


def empty_nhwc(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty (..., C, H, W) tensor that lies in memory as (..., H, W, C)."""
    *batch, channels, height, width = shape
    return like.new_empty((*batch, height, width, channels)).movedim(-1, -3)


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
    if plan == "torch":
        return weight_shape
    panels = -(-(out_channels // groups) // _PANEL)
    algorithm = plan.removesuffix("_bf16")
    pack = 1 if algorithm == plan else 2
    words = -(-group_in // pack)
    if algorithm in _WINOGRAD_POINTS:
        shape = (panels, _WINOGRAD_POINTS[algorithm], words, _PANEL)
    else:
        shape = (groups * panels, kernel_h * kernel_w * words, _PANEL)
    return shape if pack == 1 else (*shape, pack)


def packed_dtype(plan: str) -> torch.dtype:
    """The dtype of pack_conv's result for a plan of ours."""
    return torch.bfloat16 if plan.endswith("_bf16") else torch.float32


def check_pack(weight: Any, groups: Any, plan: Any) -> None:
    op = "pack_conv"
    check.conv_weight(op, weight)
    check.group_count(op, groups, None, weight.shape[0])
    check.one_of(op, "plan", plan, check.PLANS)
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
) -> tuple[int, ...]:
    op = "conv_bn_act_packed"
    check.image(op, "x", x)
    check.channel_vector(op, "scale", scale)
    kernel = check.pair(op, "kernel_size", kernel_size, 1)
    check.group_count(op, groups, x.shape[-3], scale.shape[0])
    check.one_of(op, "plan", plan, check.PLANS)
    check.plan_weight(op, plan, x.dtype, kernel, groups, stride, dilation)
    weight_shape = (scale.shape[0], x.shape[-3] // groups, *kernel)
    check.shape(op, "packed", packed, packed_shape(weight_shape, groups, plan))
    check.like(op, "packed", packed, x, x.dtype if plan == "torch" else packed_dtype(plan))
    return check.conv_args(
        op, x, weight_shape, scale, shift, residual, stride, padding, dilation, groups, act
    )
