"""Whether Python objects are still as they were: facts, checked in C (csrc/python/guard.cpp).

The functions here make facts; `watch` makes a callable of many that is True while all of them hold.
A fact keeps its objects alive. Copies and pickles have None in the place of a guard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

try:
    from ._guard import Guard as _Guard  # type: ignore[import-not-found]
    from ._guard import Snapshot as _Snapshot
except ImportError:  # not compiled, and then the modules check everything in Python
    _Guard = _Snapshot = None

Fact = tuple[int, Any, Any, Any]  # kind, object, key, expected

_IS, _EQUALS, _ABSENT, _LENGTH, _TYPE, _VERSION, _RETURNS, _LIES = range(8)  # as in guard.cpp


def item_is(owner: dict, key: str, value: Any) -> Fact:
    """owner[key] is value."""
    return (_IS, owner, key, value)


def item_equals(owner: dict, key: str, value: Any) -> Fact:
    """owner[key] == value."""
    return (_EQUALS, owner, key, value)


def absent(owner: dict, key: str) -> Fact:
    """Key not in owner."""
    return (_ABSENT, owner, key, None)


def item_length(owner: dict, key: str, length: int) -> Fact:
    """len(owner[key]) == length."""
    return (_LENGTH, owner, key, length)


def attribute(owner: Any, name: str) -> Fact:
    """owner.name == what it is now; it is the instance's own, or its class's and not hidden."""
    own = vars(owner)
    return item_equals(own, name, own[name]) if name in own else absent(own, name)


def type_is(value: Any, kind: type) -> Fact:
    """type(value) is kind."""
    return (_TYPE, value, None, kind)


def version_is(tensor: Any, version: int) -> Fact:
    """tensor._version == version."""
    return (_VERSION, tensor, None, version)


def returns(function: Callable[[], Any], value: Any) -> Fact:
    """function() == value."""
    return (_RETURNS, function, None, value)


def snapshot(tensors: Sequence[Any]) -> Callable[[], bool] | None:
    """Whether tensors on the CPU lie where they do now, with the sampled values that they have
    (csrc/cpu/samples.h); None where it was not compiled or cannot be told."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if _Snapshot is None or exchange is None:
        return None
    try:
        return _Snapshot(exchange, tensors)
    except (RuntimeError, ValueError, BufferError):
        return None


def lies(taken: Callable[[], bool]) -> Fact:
    """A snapshot of tensors still holds."""
    return (_LIES, taken, None, None)


def watch(facts: Iterable[Fact]) -> Callable[[], bool] | None:
    """Whether every fact holds, to be called again and again; None where it was not compiled.

    Of facts about one place the last counts: no two values can be there.
    """
    places = {
        (kind, id(owner), key): (kind, owner, key, value) for kind, owner, key, value in facts
    }
    return None if _Guard is None else _Guard(places.values())
