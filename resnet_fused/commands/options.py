"""Options that several commands and benchmarks take, checked before anything runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
import torch

from ..tuned import can_write

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BatchSizes(click.ParamType):
    """ "1,8,32" -> (1, 8, 32)."""

    name = "n,n,..."

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(word) for word in value.split(","))
        except ValueError:
            sizes = (0,)
        if min(sizes) < 1:
            self.fail(f"must be positive integers between commas, got {value!r}", param, ctx)
        return sizes


class Seconds(click.FloatRange):
    """A number of seconds, which click's own range lets be NaN or infinite."""

    def convert(self, value, param, ctx) -> float:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"must be finite, got {value}", param, ctx)
        return seconds


class OutputFile(click.Path):
    """A file that can be written, in a folder that can be made."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)

    def convert(self, value, param, ctx) -> Any:
        path = super().convert(value, param, ctx)
        if not can_write(path.parent):
            self.fail(f"{path.parent} is no folder that can be written to", param, ctx)
        return path


FILE = OutputFile()
SECONDS = Seconds(min=0)
