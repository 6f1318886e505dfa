"""tune: measures every plan for every convolution of a model on this machine, and keeps the answer.

`select` takes the fastest measured plan from then on, in this process and, through a small file
(_tuning_file), in later ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from rich.console import Console
from torch import nn

from . import check, tuned
from ._call import check_example
from ._progress import progress_bar
from ._tables import table, time_text
from ._tuning_file import Answer
from .fuse import refresh
from .measure.convolutions import Found, convolutions, fused_modules, weight_bytes
from .measure.plans import Row, measure_convolution


class Tuning(Sequence[Row]):
    """The rows in the order of the model; prints as a table. path: the file, None if in none."""

    def __init__(self, rows: Sequence[Row], path: Path | None) -> None:
        self._rows = tuple(rows)
        self.path = path

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index):
        return self._rows[index]

    @property
    def plans(self) -> tuple[str, ...]:
        """Those measured of any convolution, in the order of check.PLANS."""
        return tuple(plan for plan in check.PLANS if any(plan in row.ms for row in self))

    def table(self) -> tuple[dict[str, str], list[list[str]]]:
        """Heading -> "left" or "right", and the rows' cells; times in milliseconds."""
        numbers = ("batch", "count", *self.plans)
        headings = {"convolution": "left"} | dict.fromkeys(numbers, "right")
        headings |= {"fastest": "left", "by rule": "left"}
        rows = []
        for row in self:
            times = [_time(row.ms[plan]) if plan in row.ms else "" for plan in self.plans]
            start = [str(row.shape), str(row.shape.batch), str(row.count)]
            rows.append([*start, *times, row.plan, row.by_rule])
        return headings, rows

    def summary(self) -> str:
        """What it brings, and where it is kept."""
        timed = [row for row in self if row.ms]
        if not timed:
            return "nothing was measured: only one plan can compute each convolution"
        kept = f"kept in {self.path}" if self.path else "kept in this process only"
        if not all(row.ms.get(row.by_rule) for row in timed):
            return kept
        best = sum(row.count * row.ms[row.plan] for row in timed)
        rule = sum(row.count * row.ms[row.by_rule] for row in timed)
        return f"all convolutions: {time_text(best)}, by rule {time_text(rule)}; {kept}"

    def __str__(self) -> str:
        if not self._rows:
            return "no convolution ran fused"
        return f"{table(*self.table())}\n{self.summary()}"

    __repr__ = __str__


def tune(
    fused: nn.Module,
    x: Any,
    *,
    allow: Sequence[str] = (),
    seconds: float = 1.0,
    progress: bool = True,
) -> Tuning:
    """Measures the plans of every convolution of a fused model on this machine, ours and PyTorch's.

    The model runs on x once, in eval mode without gradients, to find its convolutions. Every plan
    that can compute one is verified against float64 and timed, interleaved with the others. From
    then on the fastest is chosen for this convolution, at any batch: the last tuning counts. A
    model that is `exact_nonfinite` gets the fastest of the plans that are. The
    answer holds for this processor (a CPU with its instruction set and number of threads, or a GPU
    and its driver), torch and package. On a GPU the kernels' configurations are measured, too, and
    each batch has an answer of its own. It is kept in
    the file that RESNET_FUSED_TUNE_FILE names ("none": in no file), else in the user's cache
    folder. Where it cannot be written, a warning says so, and the answer holds in this process.

    fused: a model with fused modules. x: an example input (a tensor, a tuple of arguments, a dict
        of keyword arguments), with the batch and the size to be fast at.
    allow: plans that are measured although their error is above a convolution's bound (twice
        eager's, or what `verify` grants the dtype), the opt-in ones among check.PLANS.
    seconds: timed per convolution. progress: show a bar on a terminal's standard error.

    Training flags, BN statistics and random states stay what they were; packed weights are dropped.
    Raises TypeError and ValueError for bad arguments, a model without fused modules or one that
    cannot run on x, and RuntimeError where a plan computes something else than the convolution.
    """
    _check(fused, x, allow, seconds)
    if not fused_modules(fused):
        raise ValueError(
            f"tune: fused must have fused modules, got a {type(fused).__name__} without: "
            "resnet_fused.fuse(model) makes them"
        )
    try:
        found = convolutions(fused, x)
        rows = _measure_all(found, tuple(allow), weight_bytes(fused), seconds, progress)
    finally:
        refresh(fused)
    return Tuning(rows, learn(rows))


def learn(rows: Sequence[Row]) -> Path | None:
    """Keeps the answers by the processor that gave them; returns the file, None if in none."""
    answers: dict[tuple[str, int], dict[str, Answer]] = {}
    for r in rows:
        if r.ms.get(r.plan):
            processor = (r.shape.device, r.shape.index if r.shape.device == "cuda" else 0)
            answer = Answer(r.shape.batch, r.plan, r.ms, r.configs)
            answers.setdefault(processor, {})[str(r.shape)] = answer
    path = None
    for (device, index), found in answers.items():
        path = tuned.learn(found, device=device, index=index)
    return path


def _check(fused: Any, x: Any, allow: Any, seconds: Any) -> None:
    check.module("tune", "fused", fused)
    check_example("tune", x)
    if isinstance(allow, str) or not isinstance(allow, Sequence):
        raise TypeError(f"tune: allow must be a sequence of plans, got {allow!r}")
    for plan in allow:
        check.one_of("tune", "allow", plan, check.PLANS)
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"tune: seconds must be a number, got {type(seconds).__name__}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"tune: seconds must be at least 0 and finite, got {seconds}")


def _measure_all(
    found: Sequence[Found],
    allow: tuple[str, ...],
    packed_bytes: int,
    seconds: float,
    progress: bool,
) -> list[Row]:
    rows = []
    with progress_bar(Console(stderr=True, quiet=not progress)) as bar:
        task = bar.add_task("", total=len(found))
        for i, f in enumerate(found):
            bar.update(task, description=str(f.call.shape), completed=i)

            def on_round(done: int, total: int, i: int = i) -> None:
                bar.update(task, completed=i + done / total)

            rows.append(
                measure_convolution(
                    f,
                    allow=allow,
                    weight_bytes=packed_bytes,
                    seconds=seconds,
                    on_round=on_round,
                )
            )
    return rows


def _time(ms: float | None) -> str:
    return "inexact" if ms is None else time_text(ms).removesuffix(" ms")
