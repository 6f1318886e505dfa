"""The ops in Python, for every device: a GPU's kernels where they serve (_gpu), else PyTorch's ops.

On the CPU the kernels of the C++ extension, where it is loaded, go before them. conv_bn_act and
conv_bn_act_kept, which only choose and pack, are here for every device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import check, reference, select
from .._extension import extension_error
from .._schemas import library
from ..conv_shape import Geometry
from . import _gpu
from ._kept import kept_weights
from ._shapes import (
    as_runtime_error,
    block_convs,
    check_block,
    check_kept,
    check_pack,
    check_packed,
    dense_nhwc,
    empty_in_format,
    empty_nhwc,
)

_ops = torch.ops.resnet_fused


def _impl(name: str, key: str = "CompositeExplicitAutograd", **options: bool) -> Callable:
    def register(function: Callable) -> Callable:
        library.impl(name, function, key, **options)
        return function

    return register


def _pair(values):
    """The schema's int[2], where one value may stand for both."""
    return (*values, *values)[:2]


@_impl("conv_bn_act")
def _conv_bn_act(
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
    """Chooses, packs, runs. Modules do the first two once and keep the result."""
    result = as_runtime_error(
        check.conv_bn_act,
        *("conv_bn_act", x, weight, scale, shift, residual, stride, padding, dilation, groups, act),
    )
    stride, padding, dilation = map(_pair, (stride, padding, dilation))
    shape = select.ConvShape.of(
        Geometry((weight.shape[2], weight.shape[3]), stride, padding, dilation, groups),
        device=x.device,
        dtype=x.dtype,
        batch=x.shape[0] if x.dim() == 4 else 1,
        channels=(x.shape[-3], weight.shape[0]),
        out_size=result[-2:],
    )
    return _ops.conv_bn_act_kept(
        x,
        weight,
        scale,
        shift,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
        plan=select.choose(shape).plan,
    )


@_impl("conv_bn_act_kept")
def _conv_bn_act_kept(
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
    as_runtime_error(
        check_kept,
        *(x, weight, scale, shift, residual, stride, padding, dilation, groups, act, plan, pool),
    )
    return _ops.conv_bn_act_packed(
        x,
        kept_weights.pack(weight, groups, plan),
        scale,
        shift,
        residual,
        kernel_size=(weight.shape[2], weight.shape[3]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
        plan=plan,
        pool=pool,
    )


@_impl("pack_conv")
def _pack_conv(weight, groups=1, *, plan):
    as_runtime_error(check_pack, weight, groups, plan)
    _refuse_ours("pack_conv", plan, weight)
    return empty_nhwc(weight, tuple(weight.shape)).copy_(weight)


@_impl("conv_bn_act_packed")
def _conv_bn_act_packed(
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
    as_runtime_error(
        check_packed,
        *(x, packed, scale, shift, residual, kernel_size, stride, padding, dilation, groups, act),
        *(plan, pool),
    )
    _refuse_ours("conv_bn_act_packed", plan, x)
    keywords = {
        "stride": _pair(stride),
        "padding": _pair(padding),
        "dilation": _pair(dilation),
        "groups": groups,
        "act": act,
    }
    if plan == "torch":
        y = _gpu.conv_by_torch(x, packed, scale, shift, residual, **keywords)
    else:
        keywords["kernel_size"] = _pair(kernel_size)
        if pool and residual is None:
            geometry = Geometry.of(keywords)
            where = (x.device, x.dtype, (1, *x.shape)[-4:], scale.shape[0])
            if _gpu.pools_at_once(plan, *where, geometry):
                return _gpu.conv_with_pool(x, packed, scale, shift, geometry, act)
        y = _gpu.conv(plan, x, packed, scale, shift, residual, **keywords)
    return dense_nhwc(reference.max_pool(y) if pool else y)


@_impl("residual_block")
def _residual_block(x, packed, scales, shifts, *, has_shortcut, **lists):
    def checked():
        convs = block_convs(has_shortcut, packed, scales=scales, shifts=shifts, **lists)
        check_block(x, convs, has_shortcut)
        return convs

    convs = as_runtime_error(checked)
    for conv in convs:
        _refuse_ours("residual_block", conv["plan"], x)
    main, shortcut = (convs[:-1], convs[-1]) if has_shortcut else (convs, None)
    y = x
    for conv in main[:-2]:
        y = _ops.conv_bn_act_packed(y, **conv)
    ending = _gpu.ending(x.device, (1, *y.shape)[-4:], main, shortcut)
    if ending == "tail":
        return _gpu.conv_tail(y, *main[-2:], x)
    for conv in main[-2:-1]:
        y = _ops.conv_bn_act_packed(y, **conv)
    if ending == "joined":
        return _gpu.conv_with_shortcut(y, main[-1], x, shortcut)
    residual = x if shortcut is None else _ops.conv_bn_act_packed(x, **shortcut)
    return _ops.conv_bn_act_packed(y, residual=residual, **main[-1])


def _refuse_ours(op: str, plan: str, where: Tensor) -> None:
    if plan not in check.plans_of(where.device.type) or plan == "torch":
        return
    if check.PLAN_TRAITS[plan].device == "cpu":
        reason = extension_error or f"there is none for {where.device.type}"
        raise RuntimeError(f'{op}: plan "{plan}" needs our compiled CPU kernel: {reason}')


@_impl("add_relu")
def _add_relu(a, b):
    as_runtime_error(check.add_relu, "add_relu", a, b)
    y = _gpu.add_relu(a, b)
    out = empty_in_format(a)
    return y if y.stride() == out.stride() else out.copy_(y)


_SAMPLES = 64  # values looked at in a tensor of more than one dimension, csrc/cpu/samples.h


@_impl("content_sample")
def _content_sample(tensors):
    samples = []
    for tensor in tensors:
        values = tensor.detach().flatten()
        if tensor.dim() > 1 and values.numel() > _SAMPLES:
            steps = torch.arange(_SAMPLES, device=values.device)
            step = values.numel() // _SAMPLES
            values = values[steps * step + (steps * 5) % step]
        samples.append(values.contiguous().view(torch.uint8))
    return torch.cat(samples)


@_impl("content_equal")
def _content_equal(tensors, sample):
    return torch.equal(_content_sample(tensors), sample)


@_impl("content_hash")
def _content_hash(tensors):
    total = 0
    for tensor in tensors:
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        values = tensor.detach().flatten().view(words).long()
        place = torch.arange(1, values.numel() + 1, device=values.device)
        mixed = (values + place * 0x9E3779B1) * (place * 2 + 1)
        total = (total * 31 + int((mixed ^ (mixed >> 29)).sum())) % (1 << 63)
    return total
