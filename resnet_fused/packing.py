"""Packed weights: BN folded to scale and shift, and a plan's weight layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import select
from .conv_shape import Geometry, as_pair
from .ops import _gpu
from .recipe import ConvUnit

_ops = torch.ops.resnet_fused


def fold(unit: ConvUnit) -> tuple[Tensor, Tensor]:
    """scale and shift, (out_channels,): bn(conv(x)) = (conv without bias)(x) * scale + shift.

    Folded in float64; returned in float32, float64 for float64 weights. Differentiable.
    """
    conv, bn = unit.conv, unit.bn
    wide = torch.float64
    result = torch.float64 if conv.weight.dtype == wide else torch.float32
    shift = conv.bias.to(wide) if conv.bias is not None else None
    if bn is None:
        scale = conv.weight.new_ones(conv.weight.shape[0], dtype=wide)
        shift = torch.zeros_like(scale) if shift is None else shift
        return scale.to(result), shift.to(result)
    scale = (bn.running_var.to(wide) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.to(wide)
    mean = bn.running_mean.to(wide)
    shift = (-mean if shift is None else shift - mean) * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(wide)
    return scale.to(result), shift.to(result)


def pair_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The zero padding as (rows, columns); 'same' is symmetric where match accepted it."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        sides = zip(as_pair(conv.dilation), kernel_size(conv), strict=True)
        reach = [dilation * (size - 1) for dilation, size in sides]
        return (reach[0] // 2, reach[1] // 2)
    return as_pair(conv.padding)


def kernel_size(conv: nn.Conv2d) -> tuple[int, int]:
    """From the weights, which may have been replaced by smaller ones since the module was made."""
    return (conv.weight.shape[2], conv.weight.shape[3])


def geometry(conv: nn.Conv2d) -> Geometry:
    stride, dilation = as_pair(conv.stride), as_pair(conv.dilation)
    return Geometry(kernel_size(conv), stride, pair_padding(conv), dilation, conv.groups)


def out_size(op: str, conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the convolution's output for an input of `size`.

    Raises ValueError, in the name of `op`, where there is none.
    """
    return geometry(conv).out_size(op, size)


def conv_shape(
    conv: nn.Conv2d, dtype: torch.dtype, out_size: tuple[int, int], batch: int = 1
) -> select.ConvShape:
    """This convolution in `dtype` with outputs of out_size rows and columns, for `select`."""
    return select.ConvShape.of(
        geometry(conv),
        device=conv.weight.device,
        dtype=dtype,
        batch=batch,
        channels=(conv.weight.shape[1] * conv.groups, conv.weight.shape[0]),
        out_size=out_size,
    )


@dataclass(frozen=True, eq=False)
class PackedUnit:
    """One convolution ready to run: operands and keywords of conv_bn_act_packed."""

    weight: Tensor
    scale: Tensor
    shift: Tensor
    keywords: dict[str, Any]
    choice: select.Choice

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _ops.conv_bn_act_packed(
            x, self.weight, self.scale, self.shift, residual, **self.keywords
        )

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return (self.weight, self.scale, self.shift)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of conv_bn_act_packed, behind x."""
        operands = {"packed": self.weight, "scale": self.scale, "shift": self.shift}
        return operands | self.keywords

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.keywords)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(N, K, P, Q) for an input of `size`, (N, C, H, W), before a max-pool."""
        out = self.geometry.out_size("conv_bn_act_packed", size)
        return (size[0], self.scale.shape[0], *out)

    def pools_at_once(self, size: Sequence[int], device: torch.device) -> bool:
        """Whether one GPU kernel computes it and its max-pool for images of `size`."""
        plan, pool = self.keywords["plan"], self.keywords["pool"]
        where = (device, self.weight.dtype, size, self.scale.shape[0])
        return pool and _gpu.pools_at_once(plan, *where, self.geometry)

    @property
    def reason(self) -> str:
        """Why it runs as it does, for reports."""
        if not self.keywords["pool"]:
            return self.choice.reason
        smallest = (1, self.weight.shape[1], *self.keywords["kernel_size"])
        at_once = self.choice.plan == "stem" or self.pools_at_once(smallest, self.weight.device)
        how = "in the same pass" if at_once else "in a second pass"
        return f"{self.choice.reason}; its max-pool {how}"

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.weight, self.scale, self.shift))


@dataclass(frozen=True, eq=False)
class AtOnce:
    """Several packed convolutions as one op takes them."""

    tensors: tuple[list[Tensor], list[Tensor], list[Tensor]]  # packed weights, scales, shifts
    keywords: dict[str, Any]


def at_once(units: Sequence[PackedUnit]) -> AtOnce:
    """The units in this order."""
    keywords = [unit.keywords for unit in units]

    def pairs(name: str) -> list[int]:
        return [int(value) for k in keywords for value in k[name]]

    return AtOnce(
        ([u.weight for u in units], [u.scale for u in units], [u.shift for u in units]),
        {
            "kernel_sizes": pairs("kernel_size"),
            "strides": pairs("stride"),
            "paddings": pairs("padding"),
            "dilations": pairs("dilation"),
            "groups": [k["groups"] for k in keywords],
            "acts": [k["act"] for k in keywords],
            "plans": [k["plan"] for k in keywords],
        },
    )


CONV_KEYWORDS = ("stride", "padding", "dilation", "groups", "act")


def conv_keywords(unit: ConvUnit) -> dict[str, Any]:
    """CONV_KEYWORDS of this unit, as conv_bn_act takes them."""
    conv = unit.conv
    return {
        "stride": as_pair(conv.stride),
        "padding": pair_padding(conv),
        "dilation": as_pair(conv.dilation),
        "groups": conv.groups,
        "act": unit.act,
    }


def pack(unit: ConvUnit, dtype: torch.dtype, choice: select.Choice) -> PackedUnit:
    """Packs one convolution for computing in `dtype`; also inside a graph that is captured."""
    scale, shift = (t.detach() for t in fold(unit))
    weight = unit.conv.weight.detach().to(dtype)
    weight = _ops.pack_conv(weight, unit.conv.groups, plan=choice.plan)
    keywords = {"kernel_size": kernel_size(unit.conv), "plan": choice.plan, "pool": unit.max_pool}
    return PackedUnit(weight, scale, shift, conv_keywords(unit) | keywords, choice)


def run_unpacked(
    unit: ConvUnit,
    dtype: torch.dtype,
    choice: select.Choice,
    x: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """What pack(unit, dtype, choice)(x, residual) computes, in a graph that stays as it is: packed
    weights are kept by the op, by their content."""
    scale, shift = (t.detach() for t in fold(unit))
    weight = unit.conv.weight.detach().to(dtype)
    keywords = conv_keywords(unit) | {"plan": choice.plan, "pool": unit.max_pool}
    return _ops.conv_bn_act_kept(x, weight, scale, shift, residual, **keywords)
