"""Shapes and strides without data, for torch.compile and export.

Python kernels see only the arguments that differ from the schema's defaults, so they repeat them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import check
from .._schemas import NAMESPACE, library
from ._shapes import (
    block_convs,
    check_block,
    check_gpu_conv,
    check_kept,
    check_pack,
    check_packed,
    empty_in_format,
    empty_nhwc,
    packed_dtype,
    packed_shape,
)


@torch.library.register_fake(f"{NAMESPACE}::conv_bn_act", lib=library)
def _conv_bn_act_fake(
    x,
    weight,
    scale,
    shift,
    residual=None,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    act="relu",
):
    shape = check.conv_bn_act(
        "conv_bn_act", x, weight, scale, shift, residual, stride, padding, dilation, groups, act
    )
    return empty_nhwc(x, shape)


def _add_relu_fake(op: str) -> Callable:
    def fake(a, b):
        check.add_relu(op, a, b)
        return empty_in_format(a)

    return fake


for _op in ("add_relu", "add_relu_cuda", "add_relu_triton"):
    torch.library.register_fake(f"{NAMESPACE}::{_op}", _add_relu_fake(_op), lib=library)


def _gpu_conv_fake(op: str) -> Callable:
    def fake(
        x,
        packed,
        scale,
        shift,
        residual=None,
        shortcut_x=None,
        shortcut_packed=None,
        shortcut_scale=None,
        shortcut_shift=None,
        *,
        kernel_size,
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
        act="relu",
        shortcut_stride=(1, 1),
        config="",
    ):
        shortcut = (shortcut_x, shortcut_packed, shortcut_scale, shortcut_shift)
        shape = check_gpu_conv(
            *(op, x, packed, scale, shift, residual, shortcut, kernel_size, stride, padding),
            *(dilation, groups, act, shortcut_stride),
        )
        return empty_nhwc(x, shape)

    return fake


for _op in ("conv_bn_act_cuda", "conv_bn_act_triton"):
    torch.library.register_fake(f"{NAMESPACE}::{_op}", _gpu_conv_fake(_op), lib=library)


@torch.library.register_fake(f"{NAMESPACE}::pack_conv", lib=library)
def _pack_conv_fake(weight, groups=1, *, plan):
    check_pack(weight, groups, plan)
    shape, dtype = tuple(weight.shape), packed_dtype(plan, weight.dtype)
    if plan in check.PLAIN_LAYOUT:
        return empty_nhwc(weight, shape)
    return weight.new_empty(packed_shape(shape, groups, plan), dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::conv_bn_act_packed", lib=library)
def _conv_bn_act_packed_fake(
    x,
    packed,
    scale,
    shift,
    residual=None,
    *,
    kernel_size,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    act="relu",
    plan,
    pool=False,
):
    shape = check_packed(
        *(x, packed, scale, shift, residual, kernel_size, stride, padding, dilation, groups, act),
        *(plan, pool),
    )
    return empty_nhwc(x, shape)


@torch.library.register_fake(f"{NAMESPACE}::conv_bn_act_kept", lib=library)
def _conv_bn_act_kept_fake(
    x,
    weight,
    scale,
    shift,
    residual=None,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    act="relu",
    plan,
    pool=False,
):
    shape = check_kept(
        *(x, weight, scale, shift, residual, stride, padding, dilation, groups, act, plan, pool)
    )
    return empty_nhwc(x, shape)


@torch.library.register_fake(f"{NAMESPACE}::residual_block", lib=library)
def _residual_block_fake(x, packed, scales, shifts, *, has_shortcut, **lists):
    convs = block_convs(has_shortcut, packed, scales=scales, shifts=shifts, **lists)
    return empty_nhwc(x, check_block(x, convs, has_shortcut))
