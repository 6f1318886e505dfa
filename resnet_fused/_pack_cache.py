"""The packed weights of a module: a cache, never state, made at the first call, checked at each."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from . import guard, packing, select
from ._stamp import Stamp
from ._streams import Readers
from .packing import PackedUnit
from .recipe import ConvUnit

if TYPE_CHECKING:
    from ._ready import Ready, ReadyOnGpu

_MOST_CONTEXTS = 256  # image sizes whose choices are remembered


@dataclass(eq=False)
class Packing:
    """What a module has packed, and what was made of it."""

    dtype: torch.dtype  # of the computation
    choices: tuple[select.Choice, ...]
    stamp: Stamp
    units: tuple[PackedUnit, ...]
    derived: Any = None  # what the module needs to run them
    # By the shape of the input.
    ready: dict[torch.Size, Ready | ReadyOnGpu] = field(default_factory=dict)
    readers: Readers = field(init=False)

    def __post_init__(self) -> None:
        self.readers = Readers(t for unit in self.units for t in unit.operands)

    def serving(self, dtype: torch.dtype, choices: tuple[select.Choice, ...]) -> Packing | None:
        """These packed weights for choices of the same plans, whose reasons may be others; None for
        other plans or another dtype."""
        if self.dtype != dtype:
            return None
        if self.choices == choices:
            return self
        pairs = list(zip(self.units, choices, strict=True))
        if any(unit.choice.plan != choice.plan for unit, choice in pairs):
            return None
        other = copy.copy(self)  # with what is ready: reasons change nothing that is computed
        other.choices = choices
        other.units = tuple([replace(unit, choice=choice) for unit, choice in pairs])
        return other


class PackCache:
    """The packed weights of one module's units, for one dtype and one choice of plans at a time."""

    def __init__(self) -> None:
        self.packing: Packing | None = None
        self._lock = threading.RLock()  # threads whose first calls come together pack once
        self.doubted = False  # whether the next call compares whole contents
        self._choices: dict[Any, tuple[select.Choice, ...]] = {}
        self._largest_batch = 0

    def __reduce__(self) -> tuple:
        """Copies and pickles, whose tensors are others, start empty."""
        return type(self), ()

    def largest_batch(self, batch: int) -> int:
        """The largest batch since the weights were last dropped, this one included.

        Plans follow it: with more images other layouts pay, and a model that serves batches of
        every size would pack again at each change if they followed the batch itself.
        """
        if batch > self._largest_batch:
            self._largest_batch = batch
        return self._largest_batch

    def drop(self) -> None:
        with self._lock:
            self.packing = None
            self._choices = {}
            self._largest_batch = 0

    def held(self) -> tuple[PackedUnit, ...]:
        """What is packed at the moment, perhaps nothing, perhaps stale."""
        packing = self.packing
        return packing.units if packing else ()

    def facts(self) -> list[guard.Fact]:
        """That what is packed now serves the next call, too, as far as it is told here."""
        own = vars(self)
        return [guard.item_is(own, "packing", self.packing), guard.item_is(own, "doubted", False)]

    def ready(self, shape: torch.Size) -> Ready | ReadyOnGpu | None:
        """What may serve an input of that shape at once."""
        packing = self.packing
        return None if packing is None or self.doubted else packing.ready.get(shape)

    def get(
        self,
        units: Sequence[ConvUnit],
        dtype: torch.dtype,
        context: Any,
        choose_all: Callable[[], tuple[select.Choice, ...]],
    ) -> Packing:
        """The units packed for computing in dtype, packed again if anything changed.

        choose_all() gives a plan for each unit; it is asked once for each `context`, which is
        hashable and holds all that the choice depends on but the units themselves.
        """
        with self._lock:
            doubted, held = self.doubted, self.packing
            fits = held is not None and held.stamp.fits()
            if fits and doubted:
                fits = held.stamp.fits_wholly()
            if not fits:
                self.packing = None  # before the doubt goes: other threads would trust it
            self.doubted = False
            if not fits or len(self._choices) > _MOST_CONTEXTS:
                self._choices = {}
            choices = self._choices.get(context)
            if choices is None:
                choices = self._choices[context] = choose_all()
            serving = held.serving(dtype, choices) if fits else None
            self.packing = found = serving or _pack(units, dtype, choices)
        found.readers.add_current()
        return found


def _pack(
    units: Sequence[ConvUnit], dtype: torch.dtype, choices: tuple[select.Choice, ...]
) -> Packing:
    with torch.no_grad():
        stamp = Stamp(units)
        pairs = zip(units, choices, strict=True)
        packed = tuple([packing.pack(unit, dtype, choice) for unit, choice in pairs])
    _finish(units)
    return Packing(dtype, choices, stamp, packed)


def _finish(units: Sequence[ConvUnit]) -> None:
    """Waits until a GPU has written what was packed: other threads use it on their own streams."""
    device = units[0].conv.weight.device
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
