"""What torch.compile may take for constant while it captures a graph."""

from __future__ import annotations

import sys
from collections.abc import Callable


def constant_in_graphs(function: Callable) -> Callable:
    """Lets torch.compile call `function` itself and keep the result in the graph that it captures.

    For functions whose answer depends on nothing but the process and arguments that are constant in
    a graph: strings, numbers. torch.compiler.assume_constant_result does the same, and imports
    torch._dynamo for it: 1.5 s.
    """
    function._dynamo_marked_constant = True
    return function


@constant_in_graphs
def folds_constants() -> bool:
    """Whether inductor is about to freeze the graph that is captured: parameters are constants."""
    config = sys.modules.get("torch._inductor.config")
    return config is not None and config.freezing


@constant_in_graphs
def is_exported_to_onnx() -> bool:
    """Whether the exporter that goes through torch.export is at work; the older one traces."""
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return flags is not None and flags._is_onnx_exporting
