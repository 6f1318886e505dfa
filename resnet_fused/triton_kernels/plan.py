"""What is launched for a problem: grids, scalars, constants and the workspace. Pure arithmetic."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from .config import Config
from .problem import Problem

LARGEST = 2**31 - 1  # offsets up to here have 32 bits
_MOST_PIXELS = 2**31 - 1024  # a tile's last pixel must not wrap around
_REDUCE_BLOCK = 1024


@dataclass(frozen=True)
class Launch:
    """One kernel. scalars, constants: the arguments behind the tensors, in order, by name."""

    grid: tuple[int, int, int]
    scalars: dict[str, int]
    constants: dict[str, Any]
    warps: int
    stages: int

    @property
    def values(self) -> list[Any]:
        return [*self.scalars.values(), *self.constants.values()]


@dataclass(frozen=True)
class Launches:
    """reduce: the second kernel where programs share a tile; parts: the shape of their sums."""

    conv: Launch
    reduce: Launch | None = None
    parts: tuple[int, int, int] | None = None


@functools.lru_cache(maxsize=4096)
def plan(problem: Problem, config: Config, interpreted: bool = False) -> Launches:
    """The launches of a problem cut by a configuration.

    Raises ValueError where pixels cannot be counted in 32 bits.
    """
    if problem.pixels > _MOST_PIXELS:
        raise ValueError(
            f"conv_bn_act_triton: the output must have at most {_MOST_PIXELS} pixels, "
            f"got {problem.pixels}"
        )
    tiles_m = -(-problem.pixels // config.pixels)
    tiles_n = -(-problem.group_out // config.channels)
    shortcut = problem.shortcut
    epilogue = config.split == 1
    conv = Launch(
        grid=(tiles_m * tiles_n * problem.groups, config.split, 1),
        scalars={
            "pixels": problem.pixels,
            "in_h": problem.in_size[0],
            "in_w": problem.in_size[1],
            "out_h": problem.out_size[0],
            "out_w": problem.out_size[1],
            "group_out": problem.group_out,
            "shortcut_h": shortcut.size[0] if shortcut else 0,
            "shortcut_w": shortcut.size[1] if shortcut else 0,
            "tiles_m": tiles_m,
            "tiles_n": tiles_n,
        },
        constants={
            "GROUPS": problem.groups,
            "GROUP_IN": problem.group_in,
            "KERNEL_H": problem.kernel[0],
            "KERNEL_W": problem.kernel[1],
            "STRIDE_H": problem.stride[0],
            "STRIDE_W": problem.stride[1],
            "PAD_H": problem.padding[0],
            "PAD_W": problem.padding[1],
            "DILATION_H": problem.dilation[0],
            "DILATION_W": problem.dilation[1],
            "SHORTCUT_C": shortcut.channels if shortcut else 0,
            "SHORTCUT_STRIDE_H": shortcut.stride[0] if shortcut else 1,
            "SHORTCUT_STRIDE_W": shortcut.stride[1] if shortcut else 1,
            "HAS_RESIDUAL": problem.residual and epilogue,
            "RELU": problem.act == "relu" and epilogue,
            "FLAT": problem.is_flat(config.depth),
            "BLOCK_M": config.pixels,
            "BLOCK_N": config.channels,
            "BLOCK_C": config.depth,
            "SPLIT": config.split,
            "GROUP_M": config.group,
            "SWAP": config.swap,
            "PRECISION": problem.precision,
            "WIDE": problem.largest > LARGEST,
            "HALVES": config.sums_per_thread > 64 and not config.swap,
            "INTERPRETED": interpreted,
        },
        warps=config.warps,
        stages=config.stages,
    )
    if epilogue:
        return Launches(conv)
    count = problem.pixels * problem.out_channels
    reduce = Launch(
        grid=(-(-count // _REDUCE_BLOCK), 1, 1),
        scalars={"count": count},
        constants={
            "CHANNELS": problem.out_channels,
            "SPLIT": config.split,
            "HAS_SHORTCUT": shortcut is not None,
            "HAS_RESIDUAL": problem.residual,
            "RELU": problem.act == "relu",
            "BLOCK": _REDUCE_BLOCK,
            "INTERPRETED": interpreted,
        },
        warps=4,
        stages=1,
    )
    return Launches(conv, reduce, (config.split, problem.pixels, problem.out_channels))
