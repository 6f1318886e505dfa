"""Shapes and strides without data, for torch.compile and export.

Python kernels see only the arguments that differ from the schema's defaults, so they repeat them.
"""

from __future__ import annotations

import torch

from .. import check
from .._schemas import NAMESPACE, library
from ._shapes import (
    block_convs,
    check_block,
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


@torch.library.register_fake(f"{NAMESPACE}::add_relu", lib=library)
def _add_relu_fake(a, b):
    check.add_relu("add_relu", a, b)
    return empty_in_format(a)


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
