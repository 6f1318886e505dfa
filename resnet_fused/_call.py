"""What report and verify share: calling a model on a user's example, and printing tables."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

# Wide enough that no cell is cut where the output goes to a file or a pipe.
_FILE_WIDTH = 4000


def check_example(op: str, x: Any, name: str = "x") -> None:
    """Raises TypeError unless x is something that `run` can pass on."""
    if not isinstance(x, (Tensor, tuple, list, Mapping)):
        raise TypeError(
            f"{op}: {name} must be a tensor, a tuple of arguments or a dict of keyword arguments, "
            f"got {type(x).__name__}"
        )


def run(op: str, name: str, model: nn.Module, x: Any) -> Any:
    """model(x), model(*x) for a tuple or list, model(**x) for a dict; ValueError if that fails."""
    try:
        if isinstance(x, Mapping):
            return model(**x)
        return model(*x) if isinstance(x, (tuple, list)) else model(x)
    except Exception as error:
        raise ValueError(f"{op}: {name} must run on x, got {error}") from error


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


def table(columns: Mapping[str, str], rows: Sequence[Sequence[str]]) -> str:
    """Text of a table; columns maps each heading to "left" or "right"."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else _FILE_WIDTH
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in columns.items():
        grid.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console(file=io.StringIO(), width=width, force_terminal=False, markup=False)
    console.print(grid)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)
