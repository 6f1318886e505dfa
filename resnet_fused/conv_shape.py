"""What a convolution is: its geometry, what of it a plan is chosen by, and the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import _extension
from .check import PLAN_TRAITS, dtype_name, output_size


def as_pair(setting: int | Sequence[int]) -> tuple[int, int]:
    """A setting of a convolution as (rows, columns); whoever edits one may make it an int."""
    return (setting, setting) if isinstance(setting, int) else tuple(setting)


class Geometry(NamedTuple):
    """How a convolution's window goes over its input; pairs are (rows, columns)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Geometry:
        """That of an op's keywords, whatever else is among them."""
        pairs = [tuple(keywords[name]) for name in cls._fields[:-1]]
        return cls(*pairs, keywords["groups"])

    def out_size(self, op: str, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the output for an input of `size`, (..., H, W)."""
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        return output_size(op, size[-2:], *window)


@dataclass(frozen=True)
class ConvShape:
    """What a convolution is, as far as the choice depends on it. Sizes in elements."""

    device: str  # its type: "cpu", "cuda", ...
    dtype: torch.dtype  # of the computation: autocast's, where autocast is on
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    out_size: tuple[int, int]  # rows and columns of the output
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 1
    index: int = 0  # of the device among those of its type

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
        channels: tuple[int, int],
        out_size: tuple[int, int],
    ) -> ConvShape:
        """channels: of the input and the output."""
        return cls(
            device=device.type,
            index=device.index or 0,
            dtype=dtype,
            in_channels=channels[0],
            out_channels=channels[1],
            kernel=geometry.kernel_size,
            out_size=out_size,
            stride=geometry.stride,
            dilation=geometry.dilation,
            groups=geometry.groups,
            batch=batch,
        )

    def largest_map(self) -> int:
        """Elements of the output or of the largest input that gives it, padding included.

        0 in a graph that is captured for every size.
        """
        if not all(is_static(size) for size in self.out_size):
            return 0
        input_size = [
            size * stride + (taps - 1) * dilation
            for size, stride, taps, dilation in zip(
                self.out_size, self.stride, self.kernel, self.dilation, strict=True
            )
        ]
        return self.batch * max(
            self.out_channels * math.prod(self.out_size),
            self.in_channels * math.prod(input_size),
        )

    def __str__(self) -> str:
        """The key of tuned answers: "3x3 64->128 to 28x28 stride 2x2 float32 cpu".

        With the batch on a GPU only: there all plans have one layout of packed weights.
        """
        text = (
            f"{self.kernel[0]}x{self.kernel[1]} {self.in_channels}->{self.out_channels} "
            f"to {self.out_size[0]}x{self.out_size[1]}"
        )
        if self.stride != (1, 1):
            text += f" stride {self.stride[0]}x{self.stride[1]}"
        if self.dilation != (1, 1):
            text += f" dilation {self.dilation[0]}x{self.dilation[1]}"
        if self.groups != 1:
            text += f" groups {self.groups}"
        text = f"{text} {dtype_name(self.dtype)} {self.device}"
        return f"{text} batch {self.batch}" if self.device == "cuda" else text


@dataclass(frozen=True)
class Choice:
    """plan: the layout to pack; reason: why."""

    plan: str
    reason: str

    @property
    def backend(self) -> str:
        """What runs the plan here, for reports: "direct (avx512)"."""
        on_cpu = PLAN_TRAITS[self.plan].device == "cpu"
        return f"{self.plan} ({_extension.cpu_isa()})" if on_cpu else self.plan


def is_static(size: int) -> bool:
    """Whether a size is one number: not in a graph that is captured for all of them."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)
