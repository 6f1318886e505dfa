"""Calling a model on a user's example, and leaving it as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._errors import kind_and_line


def check_example(op: str, x: Any, name: str = "x") -> None:
    """Raises TypeError unless x is something that `run` can pass on."""
    if not isinstance(x, (Tensor, tuple, list, Mapping)):
        raise TypeError(
            f"{op}: {name} must be a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"got {type(x).__name__}"
        )


def deep_copy(op: str, name: str, model: nn.Module, otherwise: str = "") -> nn.Module:
    """A deep copy; ValueError where there is none. otherwise: what the user may do instead."""
    try:
        return copy.deepcopy(model)
    except Exception as error:
        got = kind_and_line(error)
        raise ValueError(f"{op}: {name} must be deep-copyable{otherwise}, got {got}") from error


def run(op: str, name: str, model: nn.Module, x: Any) -> Any:
    """model(x), model(*x) for a tuple or list, model(**x) for a dict; ValueError if that fails."""
    try:
        if isinstance(x, Mapping):
            return model(**x)
        return model(*x) if isinstance(x, (tuple, list)) else model(x)
    except Exception as error:
        raise ValueError(f"{op}: {name} must run on x, got {kind_and_line(error)}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() without gradients; flags and random states are put back, nothing else is touched."""
    flags = [(m, m.training) for m in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            for m, _ in flags:
                m.__dict__["training"] = False
            yield
        finally:
            for m, training in flags:
                m.__dict__["training"] = training
