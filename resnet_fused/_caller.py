"""Whose code calls a layer: a question for layers that compute more, or less, than they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container

from torch import nn


def code_of(*functions: Callable) -> frozenset[int]:
    """Identities of their code; comparing code itself would take a microsecond."""
    return frozenset(id(function.__code__) for function in functions)


_CALLS = code_of(nn.Module._wrapped_call_impl, nn.Module._call_impl)


def calling_module(layer: nn.Module, own: Container[int]) -> nn.Module | None:
    """The innermost other module that has a method on the stack.

    own: code_of the layer's functions, passed over. To look for `self` costs 0.5 us in every frame.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = id(frame.f_code)
        if code not in own and code not in _CALLS:
            found = frame.f_locals.get("self")
            if isinstance(found, nn.Module) and found is not layer:
                return found
        frame = frame.f_back
    return None
