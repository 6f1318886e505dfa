"""Chains: fused modules that hand their outputs on to each other, and to nothing else, as one call.

A call of a block looks at a hundred facts and goes through Python and PyTorch's dispatcher. Within
a net that takes 50 to 90 us: the weights of the block before it have pushed all of that out of the
caches. So the first module of a chain looks at the facts of all and computes all of them, and the
average pool and linear layer behind the last; the others, which their parent's forward goes on
calling, pass the output on. ResNet-18 and ResNet-50 with one image are 1.06 and 1.05 times as fast
as before, with eight 1.01 to 1.03 (medians of runs in turns, two cores of Zen 3).
"""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import guard
from ._caller import CallPath, call_path
from ._links import Link, facts_of
from ._reads import Known
from ._ready import Head, Ready, ReadyOnGpu, is_plain

if TYPE_CHECKING:
    from ._fused import FusedModule
    from ._pack_cache import Packing
    from .head import HeadLayer

_MOST_READY = 64  # shapes of inputs, by where a call begins


@dataclass(frozen=True, eq=False)
class Stage:
    """A module of a chain. path: of its call. links: itself, and what is on the way to it from the
    chain's parent and from the stage before."""

    module: FusedModule | HeadLayer
    path: CallPath
    links: tuple[Link, ...]

    def facts(self) -> list[guard.Fact]:
        """That all of it is what it was when the chain was found."""
        facts = []
        for link in self.links:
            facts += [*facts_of(link), guard.absent(vars(link.child), "_compiled_call_impl")]
        return facts

    def is_as_it_was(self) -> bool:
        return guard.watch(self.facts())()


@dataclass(frozen=True, eq=False)
class _Serving:
    """What computes a chain, or its first modules, for inputs of one shape."""

    run: Ready | ReadyOnGpu
    others: frozenset[nn.Module]  # all that it computes but the first
    last: nn.Module
    formatted: Callable[[Tensor, Tensor], Tensor] | None  # the last one's, if it is no head's
    packings: dict[FusedModule, Packing]  # that it is made of


class _Outcomes(threading.local):
    """What chains have computed in this thread and is still on its way to their ends."""

    def __init__(self) -> None:
        self._all: dict[int, tuple[weakref.ref, _Serving]] = {}  # by the tensor's identity

    def add(self, y: Tensor, serving: _Serving) -> None:
        everything, key = self._all, id(y)

        def forget(reference: weakref.ref) -> None:
            if everything.get(key, (None,))[0] is reference:
                del everything[key]

        everything[key] = (weakref.ref(y, forget), serving)

    def passes(self, module: nn.Module, x: Tensor) -> bool:
        found = self._all.get(id(x))
        if found is None or found[0]() is not x or module not in found[1].others:
            return False
        if module is found[1].last:
            del self._all[id(x)]
        return True


_outcomes = _Outcomes()


class Chain:
    """Fused modules of which `parent.forward` calls one after the other, each once.

    reads: of the parent, and of all modules below it whose forward may call one. head: what follows
    the stages: nothing, or average pool, or that and a linear layer.
    """

    def __init__(
        self,
        parent: nn.Module,
        reads: tuple[Known, ...],
        stages: tuple[Stage, ...],
        head: tuple[Stage, ...],
    ) -> None:
        self.parent = parent
        self.stages = stages
        self.head = head
        self._reads = reads
        self._servings: dict[tuple[int, torch.Size], _Serving] = {}

    def computed(self, start: int, x: Tensor) -> Tensor | None:
        """What the last of all returns, or of as many as can be told, for an input of the module at
        `start`; None if that is this one alone.

        The others from there on compute their own.
        """
        if not is_plain():
            return None
        serving = self._servings.get((start, x.shape)) or self._prepared(start, x)
        if serving is None or not serving.run.takes(x):
            return None
        if call_path(self.parent) != self.stages[start].path:
            return None
        y = serving.run(x)
        if y is None:
            self.drop()
            return None
        if serving.formatted is not None:
            y = serving.formatted(x, y)
        _outcomes.add(y, serving)
        return y

    def drop(self) -> None:
        """Forgets what holds packed weights."""
        self._servings.clear()

    def _prepared(self, start: int, x: Tensor) -> _Serving | None:
        """From what each module has prepared for its own calls, as far as they have; kept."""
        parts, shape, stages = [], x.shape, self.stages[start:]
        for stage in stages:
            part = stage.module.chain_ready(shape)
            if part is None or not part.fits(x) or not stage.is_as_it_was():
                break
            parts.append(part)
            shape = stage.module.chain_output_shape(shape)
        whole = len(parts) == len(stages)
        head, ends = self._head_for(x, shape) if whole else (Head(), ())
        taken = (*stages[: len(parts)], *ends)
        if len(taken) < 2:
            return None
        facts = [fact for read in self._reads for fact in read.facts()]
        if not guard.watch(facts)():
            return None
        for stage in taken:
            facts += [*stage.facts(), *stage.module.chain_facts()]
        run = type(parts[0]).chain(x, facts, parts, head)
        if run is None:
            return None
        modules = [stage.module for stage in taken]
        formatted = None if ends else modules[-1].chain_formatted
        packings = {module: module.chain_packing() for module in modules[: len(parts)]}
        self._make_room(packings)
        made = _Serving(run, frozenset(modules[1:]), modules[-1], formatted, packings)
        self._servings[start, x.shape] = made
        return made

    def _make_room(self, packings: dict[FusedModule, Packing]) -> None:
        """Forgets what is made of other packed weights than these, and all if it is too much."""
        stale = [
            key
            for key, serving in self._servings.items()
            if any(packings.get(m, held) is not held for m, held in serving.packings.items())
        ]
        for key in stale:
            del self._servings[key]
        if len(self._servings) >= _MOST_READY:
            self.drop()

    def _head_for(self, x: Tensor, shape: torch.Size) -> tuple[Head, tuple[Stage, ...]]:
        """What of the head computes at once, behind a last module's output of `shape`."""
        kept = list(itertools.takewhile(Stage.is_as_it_was, self.head))
        if not kept or len(shape) != 4:
            return Head(), ()
        y = x.new_empty(shape).contiguous(memory_format=torch.channels_last)
        if not kept[0].module.serves(y):
            return Head(), ()
        if len(kept) == 1 or not kept[1].module.serves(y.new_empty(shape[:2])):
            return Head(pools=True), self.head[:1]
        operands = kept[1].module._parameters
        return Head(True, operands["weight"], operands["bias"]), self.head

    # Chains are kept by their parent, in its copies and pickles, too. Their modules only know them
    # for as long as they live: a copy of one by itself must not bring a copy of all the rest.

    def join(self) -> None:
        """Has its modules ask it."""
        for start, stage in enumerate(self.stages):
            stage.module.join_chain(self, start)

    def __deepcopy__(self, memo: dict[int, Any]) -> Chain | None:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        shared = {stage.module for stage in self.stages} & {s.module for s in twin.stages}
        if shared or twin.parent is self.parent:
            return None  # a copy of the parent with the same children, say
        twin.join()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_servings": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.join()


def passes_on(module: nn.Module, x: Tensor) -> bool:
    """Whether a chain has computed `module`, which it does not begin, and x is the outcome."""
    return _outcomes.passes(module, x)
