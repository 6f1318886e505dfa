"""Reads steps as a residual block: act(main(x) + shortcut(x)), main of conv [bn] [relu] units."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ._dataflow import Step
from .recipe import BlockRecipe, ConvUnit, NoMatch


def parse(output: Step, steps: list[Step], block: nn.Module) -> BlockRecipe:
    """The recipe of the block that `steps` compute, with `block`'s own submodules.

    Raises NoMatch with the first thing that does not fit. Every step must be part of the recipe,
    and every value between input and output must be used exactly once.
    """
    visited: list[Step] = []
    tail, act = output, "none"
    if tail.kind == "relu":
        visited.append(tail)
        tail, act = tail.inputs[0], "relu"
    if tail.kind != "add":
        raise NoMatch(_no_addition(tail, steps))
    visited.append(tail)
    paths = [_Path(summand, visited, block) for summand in tail.inputs]
    main, shortcut = sorted(paths, key=lambda path: len(path.units), reverse=True)
    if len(main.units) < 2:
        raise NoMatch(f"the longer of the two paths has {_count(len(main.units))}")
    if len(shortcut.units) > 1:
        raise NoMatch(f"the shorter of the two paths has {_count(len(shortcut.units))}")
    if main.units[-1].act != "none":
        raise NoMatch(f"an activation follows {main.units[-1].conv_name} before the addition")
    if main.pool is not None:
        raise NoMatch(f"unexpected operation {main.pool.label}")
    if shortcut.pool is not None and not shortcut.units:
        raise NoMatch(f"the shortcut is {shortcut.pool.label}")
    if shortcut.units and shortcut.units[0].act != "none":
        raise NoMatch(f"an activation follows {shortcut.units[0].conv_name} in the shortcut")
    _nothing_else(visited, steps, output)
    return BlockRecipe(
        kind=kind_of(len(main.units)),
        main=(*main.units[:-1], replace(main.units[-1], act=act)),
        shortcut=shortcut.units[0] if shortcut.units else None,
        avg_pool=_own(block, shortcut.pool),
        avg_pool_name=shortcut.pool.name if shortcut.pool else None,
    )


def kind_of(convs: int) -> str:
    """The kind of a block by the number of convolutions on its main path."""
    return "bottleneck" if convs >= 3 else "basic"


class _Path:
    """One summand, read backwards to the input."""

    def __init__(self, end: Step, visited: list[Step], block: nn.Module) -> None:
        self.units: list[ConvUnit] = []
        self.pool: Step | None = None
        step = end
        while step.kind != "input":
            relu = bn = None
            if step.kind == "relu":
                relu, step = step, step.inputs[0]
            if step.kind == "norm":
                bn, step = step, step.inputs[0]
            if step.kind == "conv":
                visited += [s for s in (relu, bn, step) if s]
                self.units.insert(0, _unit(step, bn, relu, block))
            elif step.kind == "pool" and step.inputs[0].kind == "input":
                visited.append(step)
                self.pool = step
            else:
                raise NoMatch(_unexpected(relu or bn if step.kind == "input" else step))
            step = step.inputs[0]


def _unit(conv: Step, bn: Step | None, relu: Step | None, block: nn.Module) -> ConvUnit:
    for step in (conv, bn):
        if step is not None and step.calls > 1:
            raise NoMatch(f"{step.name} is called {step.calls} times")
    return ConvUnit(
        conv=_own(block, conv),
        bn=_own(block, bn),
        act="relu" if relu else "none",
        conv_name=conv.name,
        bn_name=bn.name if bn else None,
    )


def _own(block: nn.Module, step: Step | None) -> nn.Module | None:
    return block.get_submodule(step.name) if step is not None else None


def _nothing_else(visited: list[Step], steps: list[Step], output: Step) -> None:
    for step in steps:
        if step not in visited:
            raise NoMatch(_unexpected(step))
    for step in steps:
        uses = len(step.users) + (step is output)
        if uses != 1:
            raise NoMatch(f"the result of {step.label} is used {uses} times")


def _no_addition(tail: Step, steps: list[Step]) -> str:
    if not any(step.kind == "add" for step in steps):
        return "no addition of two paths"
    if tail.kind == "act" and tail.inputs and tail.inputs[0].kind == "add":
        return f"the activation after the addition is {tail.label}"
    return f"{_unexpected(tail)} after the addition"


def _unexpected(step: Step) -> str:
    before = step.inputs[0] if step.inputs else None
    while before is not None and before.kind in ("norm", "relu"):
        before = before.inputs[0]
    if step.kind in ("norm", "relu") and before is not None and before.kind != "conv":
        return f"{step.label} does not follow a convolution"
    if step.kind == "norm":
        return f"the norm after {before.name} is {type(step.module).__name__}"
    if step.kind == "act" and before is not None and before.kind == "conv":
        return f"the activation after {before.name} is {step.label}"
    if step.kind == "dropout":
        return f"{step.label} is in use (p={step.module.p})"
    if step.kind == "argument" or step.kind == "input":
        return "a path without operations"
    return f"unexpected operation {step.label}"


def _count(convs: int) -> str:
    return "no convolution" if convs == 0 else f"{convs} convolution{'s' if convs > 1 else ''}"
