"""Whose code calls a layer: a question for layers that compute more, or less, than they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch import fx, nn

CallPath = tuple[tuple[str, int], ...]
"""Functions, each by its name and first line, the innermost first."""

# Between a layer's code and its caller's: PyTorch's calls, torch.fx recording them, ours.
_PASSED = {nn.Module.__call__.__code__.co_filename} | {
    str(Path(__file__).with_name(name))
    for name in ("_caller.py", "_chain.py", "_fused.py", "_trace.py", "slots.py")
}
_FX = str(Path(fx.__file__).parent)


def call_path(module: nn.Module) -> CallPath | None:
    """By which functions module's forward, the last of them, called the layer that asks; None if
    the forward is not running.

    Before Python 3.13 a frame keeps what f_locals returned until it ends: no other frame is asked.
    """
    own = codes(type(module).forward)
    path = []
    for entry, frame in _functions():
        path.append(entry)
        if id(frame.f_code) in own and _first_argument(frame) is module:
            return tuple(path)
    return None


def calling_sequence() -> nn.Sequential | None:
    """The nn.Sequential whose forward itself calls the layer that asks, if one does."""
    _, frame = next(_functions(), (None, None))
    if frame is None or id(frame.f_code) not in codes(nn.Sequential.forward):
        return None
    caller = _first_argument(frame)
    return caller if type(caller) is nn.Sequential else None


def call_paths(root: nn.Module, forwards: frozenset[int]) -> list[tuple[nn.Module, CallPath]]:
    """Every module up to root whose forward is running, with the call_path from it, the innermost
    first. forwards: the `codes` of those that may be."""
    paths, path = [], []
    for entry, frame in _functions():
        path.append(entry)
        if id(frame.f_code) not in forwards:
            continue
        module = _first_argument(frame)
        if isinstance(module, nn.Module):
            paths.append((module, tuple(path)))
        if module is root:
            break
    return paths


def _functions() -> Iterator[tuple[tuple[str, int], FrameType]]:
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_filename not in _PASSED and not code.co_filename.startswith(_FX):
            yield (code.co_name, code.co_firstlineno), frame
        frame = frame.f_back


def _first_argument(frame: FrameType) -> Any:
    names = frame.f_code.co_varnames
    return frame.f_locals.get(names[0]) if names else None


def codes(function: Callable | None) -> list[int]:
    """Identities of a function's code and that of those it wraps, where they take arguments."""
    codes = []
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is not None and code.co_varnames:
            codes.append(id(code))
        function = getattr(function, "__wrapped__", None)
    return codes
