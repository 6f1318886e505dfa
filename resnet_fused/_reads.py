"""What a module's forward reads of the module: once that is edited it may do something else.

A flag, say, that makes it return what lies between its layers.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import guard

# Of every module, and read by PyTorch itself at each call.
_INTERNAL = frozenset(vars(nn.Module())) - {"training", "_modules"}
_HOLDERS = ("_modules", "_parameters", "_buffers")
_VALUES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, dict, set, frozenset)
# Not looked into: changes of theirs are seen otherwise, are none, or, of a logger, tell nothing.
_OPAQUE = (
    *(nn.Module, torch.Tensor, logging.Logger),
    *(type, types.ModuleType, types.FunctionType, types.MethodType),
)


def log_reads(module: nn.Module) -> set[str]:
    """The names of attributes that are read of the module from now on, in a set that grows.

    The module, a copy that is used for nothing else, gets another class, which says it had not.
    """
    kind, names = type(module), set()

    def __getattribute__(self: nn.Module, name: str) -> Any:
        if not (name.startswith("__") or name in _INTERNAL):
            names.add(name)
        return kind.__getattribute__(self, name)

    namespace = {
        "__class__": property(lambda self: kind),
        "__getattribute__": __getattribute__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    module.__class__ = type(kind.__name__, (kind,), namespace)
    return names


@dataclass(frozen=True, eq=False)
class Read:
    """An attribute as it was: of an object itself, or of what its dict holds under `holder`."""

    owner: Any
    name: str
    value: Any = None
    holder: str = ""
    absent: bool = False  # then it is the class's, or nobody's

    def facts(self) -> list[guard.Fact]:
        """That it still is."""
        held = vars(self.owner)
        held = held[self.holder] if self.holder else held
        if self.absent:
            return [guard.absent(held, self.name)]
        same = guard.item_equals if isinstance(self.value, _VALUES + _CONTAINERS) else guard.item_is
        return [same(held, self.name, self.value)]


class ClassRead:
    """An attribute of a module's class as it was: a method, say."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self._value = getattr(type(module), name)

    def __reduce__(self) -> tuple:
        """Functions of a class need not be picklable; a copy is as they are then."""
        return type(self), (self.module, self.name)

    def facts(self) -> list[guard.Fact]:
        return [guard.returns(_getter(type(self.module), self.name), self._value)]


@functools.cache
def _getter(kind: type, name: str) -> Callable[[], Any]:
    return functools.partial(getattr, kind, name)


class Children:
    """The children of a module as they were, in their order."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._items = list(module._modules.items())

    def facts(self) -> list[guard.Fact]:
        held = self.module._modules
        same = guard.item_is(vars(self.module), "_modules", held)
        return [same, guard.returns(functools.partial(list, held.items()), self._items)]


Known = Read | ClassRead | Children


_MOST_NESTED = 4  # containers and objects in each other


def _as_now(value: Any, depth: int = _MOST_NESTED) -> Any:
    """A copy of a container, and of those in it, which are edited in place; else the value."""
    if not isinstance(value, _CONTAINERS) or not depth:
        return value
    if type(value) is dict:
        return {key: _as_now(inner, depth - 1) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_as_now(inner, depth - 1) for inner in value)
    return copy.copy(value)


def _reads_inside(value: Any, seen: set[int], depth: int = _MOST_NESTED) -> Iterator[Read]:
    """The plain values and containers that objects hold, `value` or some in it."""
    if isinstance(value, (*_VALUES, *_OPAQUE)) or id(value) in seen or not depth:
        return
    seen.add(id(value))
    if isinstance(value, _CONTAINERS):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _reads_inside(inner, seen, depth - 1)
        return
    for key, inner in getattr(value, "__dict__", {}).items():
        if isinstance(inner, _VALUES + _CONTAINERS):
            yield Read(value, key, _as_now(inner))
        yield from _reads_inside(inner, seen, depth - 1)


def reads(module: nn.Module, names: set[str]) -> Iterator[Known]:
    """These attributes of a module, and what objects among them hold, as they are now.

    But in eval mode, as when they were read.
    """
    own = vars(module) | {"training": False}
    for name in sorted(names):
        if name not in own:
            yield Read(module, name, absent=True)
            if hasattr(type(module), name):
                yield ClassRead(module, name)
            for holder in _HOLDERS:
                if name in own[holder]:
                    yield Read(module, name, own[holder][name], holder)
            continue
        value = own[name]
        yield Read(module, name, _as_now(value))
        yield from _reads_inside(value, set())
