"""What torch.compile may take for constant while it captures a graph."""

from __future__ import annotations

from collections.abc import Callable


def constant_in_graphs(function: Callable) -> Callable:
    """Lets torch.compile call `function` itself and keep the result in the graph that it captures.

    For functions whose answer depends on nothing but the process and arguments that are constant in
    a graph: strings, numbers. torch.compiler.assume_constant_result does the same, and imports
    torch._dynamo for it: 1.5 s.
    """
    function._dynamo_marked_constant = True
    return function
