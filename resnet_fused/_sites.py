"""Finds conv -> bn (-> ReLU) (-> max-pool) among the direct children of a module."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ._caller import CallPath
from ._dataflow import NORMS
from ._refusals import refuse_altered, refuse_mixture, refuse_pool, refuse_unit
from ._trace import MODES, any_child, record
from ._wrapper import Wrapper
from .recipe import ConvUnit, NoMatch, Site

Found = tuple[str, str, str | None]  # names of conv, bn, act


def find_sites(
    parent: nn.Module, graphs: list[fx.Graph] | NoMatch | None = None
) -> tuple[list[Site], list[tuple[str, str]]]:
    """The sites of `parent` and, as (name of the convolution, reason), the pairs left alone.

    A convolution and a batch norm are a site where parent.forward, in every mode, calls each of
    them once and hands the convolution's result to the batch norm and to nothing else. A ReLU child
    that alone reads the batch norm and is called nowhere else belongs to the site, and so does a
    stem's max-pool behind it. If parent cannot be traced, the one reason has the name "".
    `graphs`: what `call_graphs(parent)` returned or raised.
    """
    if not _has_pair(parent):
        return [], []
    try:
        graphs = graphs or call_graphs(parent)
    except NoMatch as reason:
        graphs = reason
    if isinstance(graphs, NoMatch):
        return [], [("", str(graphs))]
    per_mode = [_pairs(graph, parent) for graph in graphs]
    sites: list[Site] = []
    refused: list[tuple[str, str]] = []
    for found in per_mode[0]:
        try:
            if any(found not in pairs for pairs in per_mode):
                raise NoMatch(f"{found[1]} does not follow it in every mode, train() or eval()")
            pools = {pairs[found] for pairs in per_mode}
            pool = pools.pop() if len(pools) == 1 else None
            sites.append(replace(_site(parent, found, pool), path=_path(graphs, found[0])))
        except NoMatch as reason:
            refused.append((found[0], str(reason)))
    return sites, refused


def call_graphs(parent: nn.Module) -> list[fx.Graph]:
    """What parent.forward calls, one graph per mode, every submodule a leaf. Raises NoMatch.

    A called submodule is named by its path below `parent`.
    """
    replaced = [key for key in vars(parent) if callable(getattr(type(parent), key, None))]
    if replaced:
        raise NoMatch(f"{replaced[0]} is replaced on the instance")
    for method in ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"):
        if getattr(type(parent), method) is not getattr(nn.Module, method):
            raise NoMatch(f"its class overrides {method}")
    return record(parent, MODES, any_child)


def _path(graphs: list[fx.Graph], name: str) -> CallPath:
    """How the parent's forward calls a layer, in every mode. Raises NoMatch."""
    calls = [node for graph in graphs for node in graph.nodes if node.target == name]
    paths = {node.meta["callers"].get("") for node in calls if node.op == "call_module"}
    path = paths.pop()
    if paths or path is None:
        raise NoMatch(f"who calls {name} differs between train() and eval()")
    return path


def _has_pair(parent: nn.Module) -> bool:
    children = [c for c in parent._modules.values() if not isinstance(c, Wrapper)]
    return all(any(isinstance(c, kind) for c in children) for kind in (_ConvNd, NORMS))


def _pairs(graph: fx.Graph, parent: nn.Module) -> dict[Found, str | None]:
    """Convolutions whose one reader is a norm, with the ReLU that is the norm's one reader.

    Each with the name of the max-pool that alone reads the result, or None.
    """
    called = {n: parent.get_submodule(n.target) for n in graph.nodes if n.op == "call_module"}
    calls = Counter(id(module) for module in called.values())
    children = Counter(id(child) for child in parent._modules.values())

    def once(node: fx.Node) -> bool:
        """Whether the node is the only call of a child, with one positional argument."""
        child = id(called.get(node))
        return calls[child] == children[child] == len(node.args) == 1

    def reader(node: fx.Node) -> fx.Node | None:
        """The one call that reads the node's value."""
        users = list(node.users)
        if len(users) != 1 or not once(users[0]) or users[0].all_input_nodes != [node]:
            return None
        return users[0] if users[0].meta["ambient"] == node.meta["ambient"] else None

    def reader_of(node: fx.Node, kind: type[nn.Module]) -> fx.Node | None:
        user = reader(node)
        return user if user is not None and type(called[user]) is kind else None

    pairs: dict[Found, str | None] = {}
    for conv, module in called.items():
        if isinstance(module, Wrapper) or not isinstance(module, _ConvNd):
            continue
        bn = reader(conv) if once(conv) else None
        if bn is not None and isinstance(called[bn], NORMS):
            act = reader_of(bn, nn.ReLU)
            pool = reader_of(act or bn, nn.MaxPool2d)
            names = (conv.target, bn.target, act.target if act is not None else None)
            pairs[names] = pool.target if pool is not None else None
    return pairs


def _site(parent: nn.Module, found: Found, pool_name: str | None) -> Site:
    conv_name, bn_name, act_name = found
    layers = {name: parent.get_submodule(name) for name in found if name is not None}
    for name, layer in layers.items():
        refuse_altered(layer, name)
    pool = _stem_pool(parent, pool_name)
    act = "relu" if act_name else "none"
    unit = ConvUnit(layers[conv_name], layers[bn_name], act, conv_name, bn_name, pool is not None)
    refuse_unit(unit)
    refuse_mixture((unit,))
    return Site(unit, act_name, pool, pool_name if pool is not None else None)


def _stem_pool(parent: nn.Module, name: str | None) -> nn.MaxPool2d | None:
    """The max-pool behind a site if the site can compute it too; else it stays as it is."""
    if name is None:
        return None
    pool = parent.get_submodule(name)
    try:
        refuse_altered(pool, name)
        refuse_pool(pool, name)
    except NoMatch:
        return None
    return pool
