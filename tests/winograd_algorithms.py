"""The Winograd algorithms as tables, for tests: what csrc/cpu/winograd_points.h says they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Algorithm:
    """An algorithm in one dimension, for 3 taps."""

    out: int  # output pixels of a tile
    stride: int
    points: tuple[float, ...]  # the finite ones; infinity follows them

    @property
    def products(self) -> int:
        """Of a tile; at stride 2 the middle tap's are plain ones behind the interpolated ones."""
        return len(self.points) + 1 + (self.out if self.stride == 2 else 0)

    @property
    def window(self) -> int:
        """Input pixels of a tile."""
        return self.stride * (self.out - 1) + 3

    def weight_transform(self) -> Tensor:
        """G, in float64: what each of the three taps contributes to each product."""
        g = torch.zeros(self.products, 3, dtype=torch.float64)
        taps = [0, 1, 2] if self.stride == 1 else [0, 2]
        for i, p in enumerate(self.points):
            norm = 1.0
            for q in self.points[:i] + self.points[i + 1 :]:
                norm *= p - q
            for power, tap in enumerate(taps):
                g[i, tap] = p**power / norm
        g[len(self.points), 2] = 1
        g[len(self.points) + 1 :, 1] = 1
        return g


ALGORITHMS = {
    "winograd2": Algorithm(2, 1, (0, 1, -1)),
    "winograd4": Algorithm(4, 1, (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)),
    "winograd5": Algorithm(5, 1, (1 / 4, -1 / 4, 7 / 8, -7 / 8, 7 / 4, -7 / 4)),
    "winograd2s2": Algorithm(2, 2, (1, -1)),
    "winograd4s2": Algorithm(4, 2, (3 / 8, -3 / 8, 5 / 4, -5 / 4)),
}


def algorithm(plan: str) -> Algorithm | None:
    """None for plans that are no Winograd."""
    return ALGORITHMS.get(plan.removesuffix("_bf16").removesuffix("_raw"))
