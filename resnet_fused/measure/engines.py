"""The ways to run a net that are compared, each with the settings that suit it best.

An engine turns a plain eval net and an input into something `Prepared`. All run under inference
mode; all but plain eager get weights and input in channels_last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

import resnet_fused as rf

from .._errors import one_line
from .timing import Runner, Timed

EAGER = "eager"
CHANNELS_LAST = "eager channels_last"
COMPILE = "torch.compile"
FUSED = "fused"
OURS = "fused, own kernels"
RECORDED = "fused + CUDA graph"
GRAPHED = "fused + rf.graph"
OWN = (FUSED, OURS, RECORDED, GRAPHED)  # all others are peers


class Prepared(Timed, Protocol):
    """Something to time that can tell what it computes."""

    def run(self) -> object:
        """One run; what it returns."""


Engine = Callable[[nn.Module, Tensor], Prepared]


class Unavailable(Exception):
    """Why an engine cannot run here, in one line."""


def engines(*, compile: bool = True, ours: bool = False) -> dict[str, Engine]:
    """Name -> engine, in the order of the tables. `ours` adds fused with own kernels forced."""
    table = {
        EAGER: _eager,
        CHANNELS_LAST: _channels_last,
        COMPILE: _compile,
        FUSED: _fused,
        OURS: _ours,
    }
    if not compile:
        del table[COMPILE]
    if not ours:
        del table[OURS]
    return table


def prepare(name: str, engine: Engine, model: nn.Module, x: Tensor) -> tuple[Prepared, Tensor]:
    """A runner that has run once, and the logits of that run (N, classes); raises Unavailable."""
    try:
        runner = engine(model, x)
        return runner, runner.run()
    except Exception as error:  # a peer may fail in any way: no compiler, a dtype it lacks
        if name in OWN and not isinstance(error, Unavailable):
            raise
        raise Unavailable(one_line(error)) from error


def _to_channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    last = torch.channels_last
    return copy.deepcopy(model).to(memory_format=last), x.contiguous(memory_format=last)


def _eager(model: nn.Module, x: Tensor) -> Runner:
    return Runner(lambda: model(x), torch.inference_mode)


def _channels_last(model: nn.Module, x: Tensor) -> Runner:
    model, x = _to_channels_last(model, x)
    return Runner(lambda: model(x), torch.inference_mode)


def _compile(model: nn.Module, x: Tensor) -> Runner:
    """Inductor with freezing: weights become packed constants, its fastest inference mode."""
    import torch._dynamo.config
    import torch._inductor.config

    model, x = _to_channels_last(model, x)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    # fullgraph makes a recompile limit an error instead of a silent return to eager
    with (
        torch._inductor.config.patch(freezing=True),
        torch._dynamo.config.patch(recompile_limit=64),
        torch.inference_mode(),
    ):
        compiled(x)
    return Runner(lambda: compiled(x), torch.inference_mode)


def _fused(model: nn.Module, x: Tensor) -> Runner:
    fused = rf.fuse(model)
    x = x.contiguous(memory_format=torch.channels_last)
    return Runner(lambda: fused(x), torch.inference_mode)


def _ours(model: nn.Module, x: Tensor) -> Runner:
    runner = _fused(model, x)
    return Runner(runner.call, _inference_on_own_kernels)


@contextmanager
def _inference_on_own_kernels() -> Iterator[None]:
    with torch.inference_mode(), rf.select.forced("ours"):
        yield
