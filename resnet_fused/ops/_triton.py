"""conv_bn_act_triton and add_relu_triton: the Triton kernels as ops, on a GPU or interpreted.

Triton itself is imported at the first use: it may be missing.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from .. import check
from ._library import library
from ._shapes import as_runtime_error, check_gpu_conv, dense_nhwc, empty_in_format, empty_nhwc

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
OLDEST_CAPABILITY = (8, 0)
KEY = "CPU" if INTERPRETED else "CUDA"


@functools.cache
def triton_error(device: torch.device) -> str | None:
    """Why the Triton kernels cannot serve a device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if INTERPRETED:
        return None if device.type == "cpu" else "Triton's interpreter is on, for the CPU"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is not None:
        return "the Triton kernels were not tried on AMD's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"sm_{capability[0]}{capability[1]} is older than sm_80"
    return None


@functools.cache
def _kernels() -> ModuleType:
    from ..triton_kernels import launch

    return launch


def _conv(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    shortcut_x: Tensor | None = None,
    shortcut_packed: Tensor | None = None,
    shortcut_scale: Tensor | None = None,
    shortcut_shift: Tensor | None = None,
    *,
    kernel_size,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    act="relu",
    shortcut_stride=(1, 1),
    config="",
) -> Tensor:
    shortcut = (shortcut_x, shortcut_packed, shortcut_scale, shortcut_shift)
    shape = as_runtime_error(
        check_gpu_conv,
        *("conv_bn_act_triton", x, packed, scale, shift, residual, shortcut, kernel_size, stride),
        *(padding, dilation, groups, act, shortcut_stride),
    )
    y = empty_nhwc(x, shape)
    if y.numel() == 0:
        return y
    batched = x.dim() == 4
    images = [t if t is None or batched else t.unsqueeze(0) for t in (x, residual, shortcut_x)]
    x, residual, shortcut_x = (None if t is None else dense_nhwc(t) for t in images)
    launch = _kernels()
    problem = launch.problem_of(
        x,
        tuple(packed.shape),
        (shape[-2], shape[-1]),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        act=act,
        residual=residual is not None,
        shortcut_x=shortcut_x,
        shortcut_stride=tuple(shortcut_stride),
    )
    weights = [None if t is None else dense_nhwc(t) for t in (packed, shortcut_packed)]
    vectors = [None if t is None else t.contiguous() for t in (scale, shift, *shortcut[2:])]
    operands = [x, weights[0], *vectors[:2], residual, shortcut_x, weights[1], *vectors[2:]]
    launch.conv(problem, operands, y, config)
    return y


def _conv_fake(
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
        *("conv_bn_act_triton", x, packed, scale, shift, residual, shortcut, kernel_size, stride),
        *(padding, dilation, groups, act, shortcut_stride),
    )
    return empty_nhwc(x, shape)


def _add_relu(a: Tensor, b: Tensor) -> Tensor:
    as_runtime_error(check.add_relu, "add_relu_triton", a, b)
    y = empty_in_format(a)
    if y.numel() == 0:
        return y
    # In y's order, without gaps; empty_like gives such an order for any a.
    a, b = (t if t.stride() == y.stride() else torch.empty_like(y).copy_(t) for t in (a, b))
    _kernels().add_relu(a, b, y)
    return y


def _add_relu_fake(a, b):
    check.add_relu("add_relu_triton", a, b)
    return empty_in_format(a)


library.impl("conv_bn_act_triton", _conv, KEY)
library.impl("add_relu_triton", _add_relu, KEY)
torch.library.register_fake("resnet_fused::conv_bn_act_triton", _conv_fake, lib=library)
torch.library.register_fake("resnet_fused::add_relu_triton", _add_relu_fake, lib=library)
