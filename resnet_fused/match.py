"""Finds residual blocks and conv-BN sites in modules by tracing what their forward computes.

A block matches when its whole dataflow was proved to be

    act(main(x) + shortcut(x))      act: relu or nothing
    main:     at least two of  conv [bn] [relu]
    shortcut: x  or  conv [bn], an AvgPool2d before it allowed

in eval and in train mode, with and without gradients. The order in which children were registered
proves nothing and is never looked at. Everything else is refused with a reason for the report.
"""

from __future__ import annotations

import dis
from dataclasses import dataclass
from types import CodeType

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ._dataflow import resolve, skips
from ._dry_run import confirm
from ._grammar import kind_of, parse
from ._refusals import refuse_block, refuse_recipe
from ._sites import call_graphs, find_sites
from ._trace import EVAL, record, record_all, unit_leaf
from .recipe import BlockRecipe, NoMatch

__all__ = ["Verdict", "call_graphs", "find_sites", "inspect_block", "match_block"]

# A module with more convolutions than this is a network, not a block.
_MAX_CONVS = 16


_ADD_OPCODES = ("BINARY_ADD", "INPLACE_ADD")  # of Python 3.10


@dataclass(frozen=True, eq=False)
class Verdict:
    """A recipe, or why there is none.

    candidate: whether a user would call the module a residual block: it adds a path with
    convolutions.
    """

    kind: str
    recipe: BlockRecipe | None
    reason: str
    candidate: bool


def match_block(module: nn.Module) -> BlockRecipe:
    """The recipe of a residual block, naming `module`'s own submodules.

    Raises NoMatch, whose text is the reason, when the dataflow of `module` was not proved to be
    that of a residual block that the fused modules compute.
    """
    refuse_block(module)
    recipe = parse(*resolve(record_all(module, unit_leaf), module), module)
    refuse_recipe(recipe)
    confirm(module, recipe)
    return recipe


def inspect_block(module: nn.Module) -> Verdict:
    """match_block without the exception."""
    if type(module).__module__.startswith("torch.nn."):
        return Verdict("basic", None, f"a {type(module).__name__} adds nothing by itself", False)
    if not 1 <= _convs(module) <= _MAX_CONVS:
        return Verdict("basic", None, "no residual block by its number of convolutions", False)
    try:
        recipe = match_block(module)
    except NoMatch as reason:
        convs = _skips(module)
        return Verdict(kind_of(convs), None, str(reason), convs > 0)
    return Verdict(recipe.kind, recipe, "", True)


def _skips(module: nn.Module) -> int:
    """How many convolutions an addition of `module` skips; a guess where it cannot be traced."""
    graph = _graph(module)
    if graph is not None:
        return skips(graph, module)
    if not _adds(type(module).forward):
        return 0
    return 3 if "bottleneck" in type(module).__name__.lower() else 1


def _convs(module: nn.Module) -> int:
    return sum(isinstance(m, _ConvNd) for m in module.modules())


def _graph(module: nn.Module) -> fx.Graph | None:
    try:
        return record(module, [EVAL], unit_leaf)[0]
    except NoMatch:
        return None


def _adds(forward: object) -> bool:
    """Whether the code of an untraceable forward contains an addition."""
    code = getattr(getattr(forward, "__wrapped__", forward), "__code__", None)
    pending = [code] if code else []
    while pending:
        code = pending.pop()
        if {"add", "add_"} & set(code.co_names):
            return True
        for instruction in dis.get_instructions(code):
            if instruction.argrepr in ("+", "+=") or instruction.opname in _ADD_OPCODES:
                return True
        pending += [const for const in code.co_consts if isinstance(const, CodeType)]
    return False
