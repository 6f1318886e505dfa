"""Loading the extensions of compiled kernels, and what the CPU's, `_C`, brings.

Loading one registers its kernels. What asks here is below the ops as well as above them.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _environment
from ._capture import constant_in_graphs
from ._schemas import NAMESPACE  # before the kernels

_ops = getattr(torch.ops, NAMESPACE)


def _nothing(prepared: int) -> None:
    pass


@dataclass(frozen=True)
class Loaded:
    """An extension. error: None where its kernels are loaded, else why they are not.

    binary: its file, "" without one. release: frees an answer of its op that prepares; no op, so
    that a finalizer may call it at any moment.
    """

    error: str | None
    binary: str = ""
    release: Callable[[int], None] = _nothing


def load(name: str, kernels: str, release: str, *, absent: str, refusal: str = "") -> Loaded:
    """Registers the kernels of an extension.

    kernels: what to call them in a sentence. release: the symbol of what frees. absent: the error
    where it was not built; refusal: why it must not be loaded though it was.
    """
    if _environment.is_set(_environment.DISABLE_EXT):
        return Loaded(f"{_environment.DISABLE_EXT} is set")
    try:
        found = importlib.util.find_spec(f"resnet_fused.{name}")
    except ImportError as error:
        return Loaded(str(error))
    if found is None or found.origin is None:
        return Loaded(f"{absent} (resnet-fused doctor says why)")
    if refusal:
        return Loaded(refusal)
    try:
        torch.ops.load_library(found.origin)  # loaded, not imported: it needs nothing of Python
    except OSError as error:
        return Loaded(str(error.__cause__ or error))  # the loader's own words, where torch has them
    try:
        return Loaded(None, found.origin, release_of(found.origin, release))
    except AttributeError:
        return Loaded(f"{kernels} are of another version: build them again")


def release_of(binary: str, name: str) -> Callable[[int], None]:
    """The function of a library that frees what was prepared."""
    release = getattr(ctypes.CDLL(binary), name)
    release.argtypes, release.restype = [ctypes.c_int64], None
    return release


_loaded = load(
    "_C",
    "the C++ kernels",
    "resnet_fused_release_prepared",
    absent="resnet_fused._C was not built",
)

extension_error: str | None = _loaded.error
"""None where the C++ kernels are loaded, else why they are not."""

release_prepared: Callable[[int], None] = _loaded.release
"""Frees what the op `prepare` returned."""


@constant_in_graphs
def cpu_isa() -> str:
    """The instruction set whose kernels run on the CPU, "none" without the extension."""
    return _ops.cpu_isa() if extension_error is None else "none"


@functools.cache
def kernels_id() -> str:
    """Eight digits that change with the compiled kernels, "none" without them."""
    if extension_error is not None:
        return "none"
    try:
        return f"{zlib.crc32(Path(_loaded.binary).read_bytes()):08x}"
    except OSError:  # replaced since it was loaded
        return "unknown"


CPU_FEATURES = frozenset(_ops.cpu_features().split() if extension_error is None else ())
"""What CPUID reports of the features that the choice looks at; empty without the extension."""
