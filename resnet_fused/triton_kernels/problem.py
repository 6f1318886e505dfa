"""A convolution as the Triton kernel sees it: sizes and what is compiled in, no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shortcut:
    """A 1x1 convolution of a second tensor that is added."""

    channels: int
    size: tuple[int, int]  # rows and columns of that tensor
    stride: tuple[int, int]


@dataclass(frozen=True)
class Problem:
    """Sizes in elements. precision: of float32 products, "tf32" or "ieee"."""

    dtype: torch.dtype
    batch: int
    in_channels: int
    in_size: tuple[int, int]
    out_channels: int
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: str = "relu"
    residual: bool = False
    shortcut: Shortcut | None = None
    precision: str = "tf32"

    @property
    def pixels(self) -> int:
        return self.batch * self.out_size[0] * self.out_size[1]

    @property
    def group_in(self) -> int:
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        return self.out_channels // self.groups

    def is_flat(self, depth: int) -> bool:
        """Whether taps and channels are one index: where a step would be mostly empty."""
        taps = self.kernel[0] * self.kernel[1]
        return taps > 1 and self.group_in < depth

    def steps(self, depth: int) -> int:
        """Of the reduction, the shortcut's included."""
        taps = self.kernel[0] * self.kernel[1]
        if self.is_flat(depth):
            main = -(-taps * self.group_in // depth)
        else:
            main = taps * -(-self.group_in // depth)
        return main + (-(-self.shortcut.channels // depth) if self.shortcut else 0)

    @property
    def is_ragged(self) -> bool:
        """Whether rows of some tensor do not begin at multiples of 16 elements."""
        rows = [self.in_channels, self.group_in, self.out_channels]
        rows.append(self.shortcut.channels if self.shortcut else 0)
        return any(row % 16 for row in rows)

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        inputs = self.batch * self.in_channels * self.in_size[0] * self.in_size[1]
        outputs = self.pixels * self.out_channels
        others = 0
        if self.shortcut:
            others = self.batch * self.shortcut.channels * self.shortcut.size[0]
            others *= self.shortcut.size[1]
        weights = self.out_channels * self.group_in * self.kernel[0] * self.kernel[1]
        return max(inputs, outputs, others, weights)
