"""Where fused modules feed only fused modules, and where code that may rely on strides."""

from __future__ import annotations

from torch import fx, nn

from ._fused import FusedModule
from ._trace import EVAL, EVAL_GRAD, record
from ._wrapper import Wrapper, is_opaque
from .recipe import NoMatch
from .slots import PassSlot

# Layers that compute the same whatever the layout is and keep it.
_KEEP_LAYOUT = (
    PassSlot,
    nn.Identity,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.modules.dropout._DropoutNd,
)


def set_formats(model: nn.Module, output_format: str) -> None:
    """Sets `output_format` of every fused module below `model`.

    "channels_last" for all; or, for "preserve", wherever the output was proved to go to fused
    modules only. Any other module ends a run of fused ones and gives the layout back: "preserve" if
    it is the whole run, "contiguous" if another fused module feeds it, with channels_last.
    """
    fused = [m for m in model.modules() if isinstance(m, FusedModule)]
    for m in fused:
        m.output_format = output_format
    if output_format == "preserve" and fused:
        _trace_runs(model)


def _trace_runs(module: nn.Module) -> None:
    if isinstance(module, Wrapper):
        return
    try:
        graphs = record(module, (EVAL, EVAL_GRAD), is_opaque)
    except NoMatch:
        for child in module.children():
            _trace_runs(child)
        return
    formats = [_formats(graph, module) for graph in graphs]
    for m in {**formats[0], **formats[1]}:
        given = {f[m] for f in formats if m in f}
        m.output_format = given.pop() if len(given) == 1 else "contiguous"


def _formats(graph: fx.Graph, root: nn.Module) -> dict[FusedModule, str]:
    called = {n: root.get_submodule(n.target) for n in graph.nodes if n.op == "call_module"}

    def feeds_fused_only(node: fx.Node) -> bool:
        users = [called.get(user) for user in node.users]
        return bool(users) and all(
            isinstance(m, FusedModule) or (isinstance(m, _KEEP_LAYOUT) and feeds_fused_only(user))
            for m, user in zip(users, node.users, strict=True)
        )

    def fed_by_fused(node: fx.Node) -> bool:
        """Whether the input is the channels_last output of another fused module."""
        sources = [source for source in node.all_input_nodes if source in called]
        return any(
            feeds_fused_only(source)
            if isinstance(called[source], FusedModule)
            else isinstance(called[source], _KEEP_LAYOUT) and fed_by_fused(source)
            for source in sources
        )

    formats: dict[FusedModule, str] = {}
    for node, module in called.items():
        if isinstance(module, FusedModule):
            ends = "contiguous" if fed_by_fused(node) else "preserve"
            new = "channels_last" if feeds_fused_only(node) else ends
            formats[module] = new if formats.get(module, new) == new else "contiguous"
    return formats
