"""The CUDA C++ kernels as ops: configurations of conv_bn_act_cuda, and the fakes of
conv_bn_act_pool_cuda, bottleneck_tail_cuda and scale_shift_act_cuda."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _gpu_kernels, check, tuned
from .._schemas import library
from .._tf32 import uses_tf32
from ..conv_shape import ConvShape, Geometry
from ._shapes import check_gpu_conv, empty_nhwc

library.impl("uses_tf32", uses_tf32, "CompositeExplicitAutograd")


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Whether the kernels of csrc/cuda/sm90 are built and can run there."""
    built = any(each.name.startswith("sm90 ") for each in configurations())
    return built and torch.cuda.get_device_capability(device) == (9, 0)


@dataclass(frozen=True)
class Configuration:
    """A tile of a CUDA C++ kernel; f"{name} split {n}" is what conv_bn_act_cuda's config takes.

    Of sm90's tiles only p64x32, p64x64 and p64x128 take another n than 1: 2, 4 or 8.
    """

    name: str
    threads: int  # of a block
    shared_bytes: int


def configurations() -> tuple[Configuration, ...]:
    """What is compiled; nothing where the kernels are not loaded."""
    if _gpu_kernels.extension_error is not None:
        return ()
    rows = torch.ops.resnet_fused.cuda_configurations().splitlines()
    parts = [row.rsplit(" ", 2) for row in rows]
    return tuple(Configuration(name, int(threads), int(size)) for name, threads, size in parts)


class Sizes(NamedTuple):
    """A convolution as conv_bn_act_cuda's kernels see it: the arguments of its configurations."""

    x: tuple[int, ...]  # (N, C, H, W)
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    shortcut_x: tuple[int, ...]  # () without one
    shortcut_stride: tuple[int, int]
    kind: str
    device: int


def kind_of(dtype: torch.dtype) -> str:
    """How elements are multiplied."""
    return "tf32" if dtype == torch.float32 and uses_tf32() else check.dtype_name(dtype)


def ranked(sizes: Sizes) -> list[str]:
    """Configurations that are worth measuring, by their modelled time."""
    return torch.ops.resnet_fused.conv_bn_act_cuda_ranked(*sizes).splitlines()


def measured(sizes: Sizes, dtype: torch.dtype) -> str:
    """The configuration that `tune` found for a convolution on this GPU, "" for the rule's."""
    return _measured(sizes, dtype, tuned.state())


@functools.lru_cache(maxsize=4096)
def _measured(sizes: Sizes, dtype: torch.dtype, state: Any) -> str:
    geometry = Geometry.of(sizes._asdict())
    shape = ConvShape.of(
        geometry,
        device=torch.device("cuda", sizes.device),
        dtype=dtype,
        batch=sizes.x[0],
        channels=(sizes.x[1], sizes.out_channels),
        out_size=geometry.out_size("conv_bn_act_cuda", sizes.x),
    )
    text = tuned.config("cuda", shape)
    # It was measured with one padding and without a shortcut.
    serves = text and not torch.ops.resnet_fused.conv_bn_act_cuda_refusal(*sizes, text)
    return text if serves else ""


def _conv_pool_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    kernel_size,
    stride=(1, 1),
    padding=(0, 0),
    act="relu",
) -> Tensor:
    op, one = "conv_bn_act_pool_cuda", (1, 1)
    *rest, height, width = check_gpu_conv(
        *(op, x, packed, scale, shift, None, (), kernel_size, stride, padding, one, 1, act, one)
    )
    if x.dtype == torch.float32:
        raise TypeError(f"{op}: x must be bfloat16 or float16, got float32")
    return empty_nhwc(x, (*rest, check.pooled_size(height), check.pooled_size(width)))


def _tail_fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    last_packed: Tensor,
    last_scale: Tensor,
    last_shift: Tensor,
    residual: Tensor | None = None,
    *,
    kernel_size,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    act="relu",
    last_act="relu",
) -> Tensor:
    op, one = "bottleneck_tail_cuda", (1, 1)
    *batch, between, height, width = check_gpu_conv(
        *(op, x, packed, scale, shift, None, (), kernel_size, stride, padding, dilation),
        *(1, act, one),
    )
    if x.dtype == torch.float32:
        raise TypeError(f"{op}: x must be bfloat16 or float16, got float32")
    check.channel_vector(op, "last_scale", last_scale)
    channels = last_scale.shape[0]
    check.shape(op, "last_packed", last_packed, (channels, between, 1, 1))
    check.like(op, "last_packed", last_packed, x, x.dtype)
    for name, value in (("last_scale", last_scale), ("last_shift", last_shift)):
        check.like(op, name, value, x, torch.float32)
        check.shape(op, name, value, (channels,))
    check.one_of(op, "last_act", last_act, check.ACTIVATIONS)
    shape = (*batch, channels, height, width)
    if residual is not None:
        check.like(op, "residual", residual, x, x.dtype)
        check.shape(op, "residual", residual, shape)
    return empty_nhwc(x, shape)


def _scale_shift_act_fake(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *, act="relu"
) -> Tensor:
    op = "scale_shift_act_cuda"
    check.image(op, "x", x)
    if x.dtype == torch.float64:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16, got float64")
    for name, value in (("scale", scale), ("shift", shift)):
        check.like(op, name, value, x, torch.float32)
        check.shape(op, name, value, (x.shape[-3],))
    if residual is not None:
        check.like(op, "residual", residual, x, x.dtype)
        check.shape(op, "residual", residual, tuple(x.shape))
    check.one_of(op, "act", act, check.ACTIVATIONS)
    return empty_nhwc(x, tuple(x.shape))


torch.library.register_fake("resnet_fused::conv_bn_act_pool_cuda", _conv_pool_fake, lib=library)
torch.library.register_fake("resnet_fused::bottleneck_tail_cuda", _tail_fake, lib=library)
torch.library.register_fake(
    "resnet_fused::scale_shift_act_cuda", _scale_shift_act_fake, lib=library
)
