"""The convolutions of a model, as its fused modules compute them on an example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import _fused, packing
from .._call import evaluating, run
from .._fused import FusedModule
from ..fuse import refresh
from .candidates import ConvCall


@dataclass(frozen=True)
class Found:
    """A convolution of the model: its commonest call, and how many there are."""

    call: ConvCall
    count: int


def fused_modules(model: nn.Module) -> list[FusedModule]:
    return [m for m in model.modules() if isinstance(m, FusedModule)]


def weight_bytes(model: nn.Module) -> int:
    """Of all weights that the model's fused modules have packed."""
    return sum(m.status().packed_bytes for m in fused_modules(model))


def convolutions(fused: nn.Module, x: Any) -> list[Found]:
    """Runs a model once and collects what its fused modules ask `select` for.

    x: an example input, as for `tune`. In eval mode without gradients; packed weights are dropped.
    """
    modules = fused_modules(fused)
    calls: dict[str, Counter[ConvCall]] = {}

    def watch(module: FusedModule, x: Tensor, dtype: torch.dtype) -> None:
        if not any(module is m for m in modules):  # another thread's
            return
        for call in _calls(module, x, dtype):
            if call.shape.batch > 0:
                calls.setdefault(str(call.shape), Counter())[call] += 1

    refresh(fused)  # what is packed already is not asked for
    with evaluating(fused), _watching(watch):
        run("tune", "fused", fused, x)
    return [Found(c.most_common(1)[0][0], c.total()) for c in calls.values()]


def _calls(module: FusedModule, x: Tensor, dtype: torch.dtype) -> Iterator[ConvCall]:
    units = module._units
    batch = x.shape[0] if x.dim() == 4 else 1
    for unit, shape in zip(units, module.conv_shapes(x, dtype, batch), strict=True):
        residual = module.adds_shortcut and unit is units[-1]
        yield ConvCall(shape, packing.pair_padding(unit.conv), unit.act, residual, unit.max_pool)


@contextmanager
def _watching(watcher: Callable[[FusedModule, Tensor, torch.dtype], None]) -> Iterator[None]:
    _fused.watchers.append(watcher)
    try:
        yield
    finally:
        _fused.watchers.remove(watcher)
