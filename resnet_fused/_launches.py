"""A fused module's convolutions on a GPU, prepared: what a repeated call launches.

The ops check their arguments at every call, Triton's choose a tile and work out grids, too, which
takes the host longer than a GPU takes for a small convolution. Here that is done once for an
input's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .ops import _gpu, _triton
from .packing import PackedUnit, at_once

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
    fixed = (unit.operands, size, device, unit.geometry, unit.keywords["act"])
    plain, adding = prepare(*fixed), prepare(*fixed, adds=True)
    pool = unit.keywords["pool"]

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        y = plain(x) if residual is None else adding(x, residual)
        return _nhwc(reference.max_pool(y)) if pool else y

    return run


def prepare_at_once(
    main: Sequence[PackedUnit], shortcut: PackedUnit | None, x: Tensor, *, adds: bool
) -> Launch | None:
    """A convolution, or with `adds` a residual block without pooling, for inputs like x
    (N, C, H, W), by one op; None where that cannot launch it."""
    units = [*main, shortcut] if shortcut is not None else list(main)
    if any(unit.keywords["plan"] != "cuda" for unit in units):
        return None
    size, device = tuple(x.shape), x.device
    pool = main[0].keywords["pool"]
    if pool and not main[0].pools_at_once(size, device):
        return None
    sizes = _input_sizes(main, size)
    ending = _ending(main, shortcut, sizes, device)
    if ending == "tail":
        return None
    if shortcut is not None:
        sizes.append(size)
    configs = [_config(unit, at, device) for unit, at in zip(units, sizes, strict=True)]
    if ending == "joined":
        stride = shortcut.keywords["stride"]
        at = len(main) - 1
        configs[at] = _config(main[-1], sizes[at], device, (size, stride))
    lists = at_once(units)
    keywords = {name: value for name, value in lists.keywords.items() if name != "plans"}
    return _gpu.Prepared(
        x,
        *lists.tensors,
        **keywords,
        configs=configs,
        has_shortcut=shortcut is not None,
        joined=ending == "joined",
        adds=adds,
        pool=pool,
    )


def _config(
    unit: PackedUnit,
    size: tuple[int, ...],
    device: torch.device,
    branch: tuple[Sequence[int], Sequence[int]] | None = None,
) -> str:
    out_channels, dtype = unit.scale.shape[0], unit.weight.dtype
    return _gpu.config(size, dtype, device, out_channels, unit.geometry, branch)


def _input_sizes(units: Sequence[PackedUnit], size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """(N, C, H, W) of each unit's input, the first one's being `size`."""
    sizes = [size]
    for unit in units[:-1]:
        sizes.append(unit.output_size(sizes[-1]))
    return sizes


def _ending(
    main: Sequence[PackedUnit],
    shortcut: PackedUnit | None,
    sizes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> _gpu.Ending:
    """How a block ends; sizes: of the input of each unit of `main`."""
    branch = None if shortcut is None else shortcut.arguments
    return _gpu.ending(device, sizes[-2:][0], [unit.arguments for unit in main], branch)


def prepare_block(
    main: Sequence[PackedUnit],
    shortcut: PackedUnit | None,
    size: tuple[int, ...],
    device: torch.device,
) -> Launch:
    """A residual block without pooling for inputs of `size`, (N, C, H, W)."""
    sizes = _input_sizes(main, size)
    *before, last = main
    at = sizes[-1]
    ending = _ending(main, shortcut, sizes, device)
    tail = before.pop() if ending == "tail" else None
    runs = [prepare_unit(unit, at, device) for unit, at in zip(before, sizes, strict=False)]
    if tail is not None:
        end = partial(_run_tail, tail.arguments, last.arguments)
    elif ending == "joined":
        end = _PREPARE[last.keywords["plan"]](
            *(last.operands, at, device, last.geometry, last.keywords["act"]),
            shortcut=shortcut.operands,
            shortcut_size=size,
            shortcut_stride=shortcut.keywords["stride"],
        )
    else:
        finish = prepare_unit(last, at, device)
        branch = None if shortcut is None else prepare_unit(shortcut, size, device)

        def end(y: Tensor, x: Tensor) -> Tensor:
            return finish(y, x if branch is None else branch(x, None))

    def run(x: Tensor) -> Tensor:
        y = x
        for step in runs:
            y = step(y, None)
        return end(y, x)

    return run


def _run_tail(before: dict[str, Any], last: dict[str, Any], y: Tensor, x: Tensor) -> Tensor:
    return _gpu.conv_tail(y, before, last, x)


def _pool_at_once(unit: PackedUnit, x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is not None:
        return unit(x, residual)
    return _gpu.conv_with_pool(x, *unit.operands, unit.geometry, unit.keywords["act"])


def _nhwc(y: Tensor) -> Tensor:
    return y.contiguous(memory_format=torch.channels_last)
