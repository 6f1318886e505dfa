"""A fused module's convolutions on a GPU, prepared: what a repeated call launches.

The ops check their arguments, choose a tile and work out grids at every call, which takes Python
longer than a GPU takes for a small convolution. Here that is done once for an input's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import _gpu, _triton
from .packing import PackedUnit

Launch = Callable[[Tensor], Tensor]

# Of a convolution with all but its images; the plan "torch" has nothing to prepare.
_PREPARE = {"triton": _triton.prepare, "cuda": _gpu.prepare}


def prepare_unit(
    unit: PackedUnit, size: tuple[int, ...], device: torch.device
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """unit(x, residual) for inputs x of `size`, (N, C, H, W), and residuals as the unit adds."""
    if unit.keywords["plan"] == "cuda" and unit.pools_at_once(size, device):
        return partial(_pool_at_once, unit)
    prepare = _PREPARE.get(unit.keywords["plan"])
    if prepare is None:
        return unit
    plain = prepare(unit.operands, size, device, **unit.keywords)
    adding = prepare(unit.operands, size, device, adds=True, **unit.keywords)
    pool = unit.keywords["pool"]

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        y = plain(x) if residual is None else adding(x, residual)
        return _nhwc(reference.max_pool(y)) if pool else y

    return run


def prepare_block(
    main: Sequence[PackedUnit],
    shortcut: PackedUnit | None,
    size: tuple[int, ...],
    device: torch.device,
) -> Launch:
    """A residual block without pooling for inputs of `size`, (N, C, H, W)."""
    *before, last = main
    sizes = [size]
    for unit in before:
        sizes.append(unit.output_size(sizes[-1]))
    at = sizes[-1]
    tail = None
    if (
        before
        and shortcut is None
        and _gpu.tails(device, sizes[-2], before[-1].arguments, last.arguments)
    ):
        tail = before.pop()
    runs = [prepare_unit(unit, at, device) for unit, at in zip(before, sizes, strict=False)]
    if tail is not None:
        joined = partial(_run_tail, tail.arguments, last.arguments)
    elif shortcut is not None and _gpu.joins(last.keywords, shortcut.keywords):
        joined = _PREPARE[last.keywords["plan"]](
            *(last.operands, at, device),
            shortcut=shortcut.operands,
            shortcut_size=size,
            shortcut_stride=shortcut.keywords["stride"],
            **last.keywords,
        )
    else:
        finish = prepare_unit(last, at, device)
        branch = None if shortcut is None else prepare_unit(shortcut, size, device)

        def joined(y: Tensor, x: Tensor) -> Tensor:
            return finish(y, x if branch is None else branch(x, None))

    def run(x: Tensor) -> Tensor:
        y = x
        for step in runs:
            y = step(y, None)
        return joined(y, x)

    return run


def _run_tail(before: dict[str, Any], last: dict[str, Any], y: Tensor, x: Tensor) -> Tensor:
    return _gpu.conv_tail(y, before, last, x)


def _pool_at_once(unit: PackedUnit, x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is not None:
        return unit(x, residual)
    return _gpu.conv_with_pool(x, *unit.operands, **unit.keywords)


def _nhwc(y: Tensor) -> Tensor:
    return y.contiguous(memory_format=torch.channels_last)
