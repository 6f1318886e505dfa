"""conv_bn_act_triton and add_relu_triton: the Triton kernels as ops, on a GPU or interpreted.

Triton itself is imported at the first use: it may be missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import check, tuned
from .._environment import INTERPRETED
from .._schemas import library
from .._tf32 import uses_tf32
from ..conv_shape import ConvShape, Geometry
from ._shapes import as_runtime_error, check_gpu_conv, dense_nhwc, empty_in_format, empty_nhwc

if TYPE_CHECKING:
    from ..triton_kernels.problem import Problem

KEY = "CPU" if INTERPRETED else "CUDA"
BY_RULE = "rule"  # a config: the rule's, whatever was measured


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
    if 0 in shape:
        return empty_nhwc(x, shape)
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
    text = config or _measured(problem, x.device)
    text = "" if text == BY_RULE else text
    conv = as_runtime_error(launch.conv, problem, x.device, text)
    y = conv([x, weights[0], *vectors[:2], residual, shortcut_x, weights[1], *vectors[2:]])
    return y if batched else y.squeeze(0)


def _measured(problem: Problem, device: torch.device) -> str:
    """The configuration that `tune` found for a convolution on this GPU, "" for the rule's."""
    p = problem
    shape = ConvShape.of(
        Geometry(p.kernel, p.stride, p.padding, p.dilation, p.groups),
        device=device,
        dtype=p.dtype,
        batch=p.batch,
        channels=(p.in_channels, p.out_channels),
        out_size=p.out_size,
    )
    text = tuned.config("triton", shape)
    return text if text and _kernels().is_able(problem, device, text) else ""


def configs(
    shape: ConvShape,
    in_size: tuple[int, int],
    padding: tuple[int, int],
    act: str,
    residual: bool,
) -> list[str]:
    """Configurations for a convolution on its GPU, those with the least estimated time first."""
    problem = _kernels().Problem(
        dtype=shape.dtype,
        batch=shape.batch,
        in_channels=shape.in_channels,
        in_size=in_size,
        out_channels=shape.out_channels,
        out_size=shape.out_size,
        kernel=shape.kernel,
        stride=shape.stride,
        padding=padding,
        dilation=shape.dilation,
        groups=shape.groups,
        act=act,
        residual=residual,
        precision="tf32" if uses_tf32() else "ieee",
    )
    return _kernels().ranked(problem, torch.device(shape.device, shape.index))


def prepare(
    operands: tuple[Tensor, Tensor, Tensor],
    size: tuple[int, ...],
    device: torch.device,
    geometry: Geometry,
    act: str,
    *,
    adds: bool = False,
    shortcut: tuple[Tensor, Tensor, Tensor] | None = None,
    shortcut_size: tuple[int, ...] = (),
    shortcut_stride: Sequence[int] = (1, 1),
) -> Callable[..., Tensor]:
    """conv_bn_act_triton with everything but the images fixed, for images of `size`.

    operands, shortcut: packed weights, scale and shift, checked before. Returns run(x), with
    `adds` run(x, residual), with a shortcut run(x, shortcut_x).
    """
    weight, scale, shift = operands
    x = weight.new_empty((1,) * 4).expand(size)  # a shape: no memory
    branch = None if shortcut is None else weight.new_empty((1,) * 4).expand(shortcut_size)
    launch = _kernels()
    problem = launch.problem_of(
        x,
        tuple(weight.shape),
        geometry.out_size("conv_bn_act_triton", size),
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        act=act,
        residual=adds,
        shortcut_x=branch,
        shortcut_stride=tuple(shortcut_stride),
    )
    conv = launch.conv(problem, device, _measured(problem, device))
    weight, fixed = dense_nhwc(weight), [None, None, None]
    if shortcut is not None:
        fixed = [dense_nhwc(shortcut[0]), *shortcut[1:]]

    def run(x: Tensor, other: Tensor | None = None) -> Tensor:
        other = None if other is None else dense_nhwc(other)
        residual, branch = (other, None) if adds else (None, other)
        return conv([dense_nhwc(x), weight, scale, shift, residual, branch, *fixed])

    return run


def _add_relu(a: Tensor, b: Tensor) -> Tensor:
    as_runtime_error(check.add_relu, "add_relu_triton", a, b)
    y = empty_in_format(a)
    if y.numel() == 0:
        return y
    # In y's order, without gaps; empty_like gives such an order for any a.
    a, b = (t if t.stride() == y.stride() else torch.empty_like(y).copy_(t) for t in (a, b))
    _kernels().add_relu(a, b, y)
    return y


library.impl("conv_bn_act_triton", _conv, KEY)
library.impl("add_relu_triton", _add_relu, KEY)
