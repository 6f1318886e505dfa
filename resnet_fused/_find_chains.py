"""Finds chains in a model by tracing it: which fused module's output goes to one other alone?"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator

import torch
from torch import fx, nn

from ._chain import Chain, Stage
from ._fused import FusedModule
from ._links import link
from ._reads import Children, Known, reads
from ._trace import EVAL, record_reads
from ._wrapper import Wrapper, is_opaque
from .head import GlobalAvgPool, Linear
from .recipe import NoMatch
from .slots import PassSlot

_KEPT = "_resnet_fused_chains"  # the attribute of a parent


def join_chains(model: nn.Module) -> None:
    """Makes chains of the fused modules below the model, in the place of those that there are."""
    part_chains(model)
    for chain in list(_chains(model)):
        vars(chain.parent).setdefault(_KEPT, []).append(chain)
        chain.join()


def part_chains(model: nn.Module) -> None:
    """Leaves no chain below the model."""
    for module in model.modules():
        vars(module).pop(_KEPT, None)
        if isinstance(module, FusedModule):
            module.join_chain(None)


def _chains(module: nn.Module) -> Iterator[Chain]:
    """Wherever the forward of `module` can be traced, or those below it."""
    if isinstance(module, Wrapper) or not any(isinstance(m, Wrapper) for m in module.modules()):
        return
    try:
        if not _takes_one_argument(module):
            raise NoMatch("what it computes depends on its other arguments")
        # Only calls in eval mode, without gradients, are served by chains.
        graph, names = record_reads(module, EVAL, is_opaque)
    except NoMatch:
        for child in module.children():
            yield from _chains(child)
        return
    yield from _Graph(module, graph, names).chains()


def _takes_one_argument(module: nn.Module) -> bool:
    """Whether its forward takes an input and nothing else that it could go by."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())
    except ValueError:
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 2 and all(p.kind in plain for p in parameters)


def _is_below(name: str, node: fx.Node) -> bool:
    return not name or node.target.startswith(f"{name}.")


class _Graph:
    def __init__(self, root: nn.Module, graph: fx.Graph, names: dict[str, set[str]]) -> None:
        self._root = root
        self._names = names
        calls = [node for node in graph.nodes if node.op == "call_module"]
        self._called = {node: root.get_submodule(node.target) for node in calls}
        self._counts = Counter(id(module) for module in self._called.values())

    def chains(self) -> Iterator[Chain]:
        seen: set[fx.Node] = set()
        for node in self._called:
            if node in seen or not self._calls(node, FusedModule):
                continue
            nodes, passed = [[node]], []  # each with what hands its input on
            after = self._reader(node)
            while self._calls(after, FusedModule) or self._passes_on(after):
                passed.append(after)
                if self._calls(after, FusedModule):
                    nodes.append(passed)
                    passed = []
                after = self._reader(after)
            seen.update(group[-1] for group in nodes)
            head = self._head(after)
            if head:
                head[0] = passed + head[0]
            if len(nodes) + len(head) > 1:
                yield self._chain(nodes, head)

    def _head(self, node: fx.Node | None) -> list[list[fx.Node]]:
        """A pool that begins at the node and a linear layer behind it, with a module between."""
        if not self._calls(node, GlobalAvgPool):
            return []
        flat = self._reader(node)
        linear = self._reader(flat) if flat is not None and self._flattens(flat) else None
        if not self._calls(linear, Linear):
            return [[node]]
        return [[node], [flat, linear] if flat in self._called else [linear]]

    def _calls(self, node: fx.Node | None, kind: type | tuple[type, ...]) -> bool:
        """Whether it is the only call of a module of that kind, with one positional argument."""
        module = self._called.get(node)
        once = module is not None and self._counts[id(module)] == 1 and "" in node.meta["callers"]
        return once and isinstance(module, kind) and len(node.args) == 1 and not node.kwargs

    def _passes_on(self, node: fx.Node | None) -> bool:
        """Whether it returns its argument itself, where a chain has computed that."""
        identity = self._calls(node, nn.Identity) and type(self._called[node]) is nn.Identity
        return identity or self._calls(node, PassSlot)

    def _flattens(self, node: fx.Node) -> bool:
        """Whether it makes (N, C) of (N, C, 1, 1), and returns an argument (N, C) itself."""
        if node in self._called:
            module = self._called[node]
            plain = type(module) is nn.Flatten and self._calls(node, nn.Flatten)
            return plain and (module.start_dim, module.end_dim) == (1, -1)
        if node.target not in (torch.flatten, "flatten"):
            return False
        given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return given in ({"start_dim": 1}, {"start_dim": 1, "end_dim": -1})

    def _reader(self, node: fx.Node) -> fx.Node | None:
        """The one node that reads this one's value, in the same modes."""
        users = list(node.users)
        if len(users) != 1 or users[0].all_input_nodes != [node] or node.meta["kept"]:
            return None
        return users[0] if users[0].meta["ambient"] == node.meta["ambient"] else None

    def _chain(self, nodes: list[list[fx.Node]], head: list[list[fx.Node]]) -> Chain:
        name = self._parent_of([node for group in nodes + head for node in group])
        befores = [None, *[group[-1] for group in (nodes + head)[:-1]]]
        groups = zip(befores, nodes + head, strict=True)
        stages = tuple([self._stage(name, before, group) for before, group in groups])
        parent = self._root.get_submodule(name)
        reads = (*self._reads(name), *self._settings(head))
        return Chain(parent, reads, stages[: len(nodes)], stages[len(nodes) :])

    def _parent_of(self, nodes: list[fx.Node]) -> str:
        """The innermost module that holds all of them and whose forward calls them: others may call
        it apart from the rest of the model."""
        name = nodes[0].target
        while not (
            all(name in node.meta["callers"] and _is_below(name, node) for node in nodes)
            and _takes_one_argument(self._root.get_submodule(name))
        ):
            name = name.rpartition(".")[0]  # in the end the root's
        return name

    def _stage(self, parent: str, before: fx.Node | None, nodes: list[fx.Node]) -> Stage:
        """Of the last of the nodes, behind the stage of `before`."""
        links = []
        for name in dict.fromkeys(self._on_the_way(parent, before, nodes)):
            holder, _, child = name.rpartition(".")
            below = name.removeprefix(f"{parent}." if parent else "")
            links.append(link(self._root.get_submodule(holder)._modules, child, below))
        path = nodes[-1].meta["callers"][parent]
        return Stage(self._called[nodes[-1]], path, tuple(links))

    def _on_the_way(
        self, parent: str, before: fx.Node | None, nodes: list[fx.Node]
    ) -> Iterator[str]:
        """Modules that are called from one stage to the next, but for layers beside them."""
        depth = parent.count(".") + 1 if parent else 0
        for node in nodes:
            path = node.target.split(".")
            yield from (".".join(path[:end]) for end in range(depth + 1, len(path) + 1))
        if before is None:
            return
        calls = list(self._called)
        layers = {node.target for node in calls}
        for node in calls[calls.index(before) + 1 : calls.index(nodes[-1]) + 1]:
            entered = (name for name in node.meta["entered"] if name not in layers)
            yield from (name for name in entered if not parent or name.startswith(f"{parent}."))

    def _reads(self, parent: str) -> Iterator[Known]:
        """What is relied on of the parent and of all modules below it that are no layers.

        Of all: one that now holds a module of the chain, too, may call it where it is not expected.
        """
        for name, names in self._names.items():
            if not parent or name == parent or name.startswith(f"{parent}."):
                module = self._root.get_submodule(name)
                yield Children(module)
                yield from reads(module, names | {"forward"})

    def _settings(self, head: list[list[fx.Node]]) -> Iterator[Known]:
        """What `_flattens` has looked at."""
        for group in head:
            for node in group:
                if type(self._called[node]) is nn.Flatten:
                    yield from reads(self._called[node], {"start_dim", "end_dim"})
