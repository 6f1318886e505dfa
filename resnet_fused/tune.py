"""tune: measures every plan for every convolution of a model on this machine, and keeps the answer.

`select` takes the fastest measured plan from then on, in this process and, through a small file
(_tuning_file), in later ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from rich.console import Console
from torch import Tensor, nn

from . import _fused, check, packing, select, tuned
from ._call import check_example, evaluating, run, table
from ._fused import FusedModule
from ._progress import progress_bar
from ._tuning_file import Answer
from .fuse import refresh
from .measure.candidates import (
    MARGIN,
    ConvCall,
    Measured,
    measure,
    pools_at_once,
    split_name,
)
from .ops import _cuda
from .select import ConvShape, milliseconds


@dataclass(frozen=True)
class Row:
    """One convolution of the model, a stem's with its max-pool.

    shape: what was measured, with its batch. count: how many convolutions of the model are like
    it. ms: plan -> median in milliseconds, None where it is not exact enough; empty where only one
    plan can compute it. errors: plan -> relative L2 against float64, of those that ran. plan: the
    fastest, by_rule where none is faster beyond chance. by_rule: what is chosen where nothing was
    measured. configs: on a GPU, plan -> the fastest configuration of its kernel, whose time is the
    plan's; no entry where that is the plan's own choice.
    """

    shape: ConvShape
    count: int
    ms: dict[str, float | None]
    errors: dict[str, float]
    plan: str
    by_rule: str
    configs: dict[str, str] = field(default_factory=dict)


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
        return f"all convolutions: {milliseconds(best)}, by rule {milliseconds(rule)}; {kept}"

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
    modules = [m for m in fused.modules() if isinstance(m, FusedModule)]
    if not modules:
        raise ValueError(
            f"tune: fused must have fused modules, got a {type(fused).__name__} without: "
            "resnet_fused.fuse(model) makes them"
        )
    try:
        found = _convolutions(fused, x, modules)
        weight_bytes = sum(m.status().packed_bytes for m in modules)
        rows = _measure_all(found, tuple(allow), weight_bytes, seconds, progress)
    finally:
        refresh(fused)
    return Tuning(rows, _learn(rows))


def _learn(rows: Sequence[Row]) -> Path | None:
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


@dataclass(frozen=True)
class _Found:
    """A convolution of the model: its commonest call, and how many there are."""

    call: ConvCall
    count: int


def _convolutions(fused: nn.Module, x: Any, modules: Sequence[FusedModule]) -> list[_Found]:
    """Runs the model once and collects what its fused modules ask `select` for."""
    calls: dict[str, Counter[ConvCall]] = {}

    def watch(module: FusedModule, x: Tensor, dtype: torch.dtype) -> None:
        if not any(module is m for m in modules):  # another thread's
            return
        for call in _calls(module, x, dtype):
            if call.shape.batch > 0:
                calls.setdefault(str(call.shape), Counter())[call] += 1

    refresh(fused)  # what is packed already is not asked for
    with evaluating(fused), _watching(watch):
        run("tune", "fused", fused, x)
    return [_Found(c.most_common(1)[0][0], c.total()) for c in calls.values()]


def _calls(module: FusedModule, x: Tensor, dtype: torch.dtype) -> Iterator[ConvCall]:
    units = module._units
    batch = x.shape[0] if x.dim() == 4 else 1
    for unit, shape in zip(units, module.conv_shapes(x, dtype, batch), strict=True):
        residual = module.adds_shortcut and unit is units[-1]
        yield ConvCall(shape, packing.pair_padding(unit.conv), unit.act, residual, unit.pool)


@contextmanager
def _watching(watcher: Callable[[FusedModule, Tensor, torch.dtype], None]) -> Iterator[None]:
    _fused.watchers.append(watcher)
    try:
        yield
    finally:
        _fused.watchers.remove(watcher)


def _measure_all(
    found: Sequence[_Found],
    allow: tuple[str, ...],
    weight_bytes: int,
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

            rows.append(_row(f, allow, weight_bytes, seconds, on_round))
    return rows


def _row(
    f: _Found,
    allow: tuple[str, ...],
    weight_bytes: int,
    seconds: float,
    on_round: Callable[[int, int], None],
    without: Collection[str] = (),
) -> Row:
    """without: candidates that are known to fail here; their plans count as inexact."""
    call, shape = f.call, f.call.shape
    by_rule = select.by_rule(shape).plan
    plans = select.candidates(shape, allow=allow)
    names = [name for name in _candidates(call, plans) if name not in without]
    if len(plans) == 1 or not names:
        return Row(shape, f.count, {}, {}, plans[0], by_rule)
    m = measure(
        call,
        names,
        by_rule,
        allow=allow,
        weight_bytes=weight_bytes,
        seconds=seconds,
        on_round=on_round,
    )
    return _row_of(f, m, plans, by_rule)


def _candidates(call: ConvCall, plans: Sequence[str]) -> list[str]:
    """What is measured: the plans as they choose themselves, then their configurations."""
    return [*plans, *(name for plan in plans for name in _configured(plan, call))]


_MOST_CONFIGS = 8  # of a plan: those with the least estimated time, each takes a second to compile


def _configured(plan: str, call: ConvCall) -> list[str]:
    """Configurations of a plan that are worth measuring, as candidates; GPU kernels have some."""
    if plan == "triton":
        from .ops import _triton

        texts = _triton.configs(call.shape, call.in_size, call.padding, call.act, call.residual)
    elif plan == "cuda" and not pools_at_once(call, plan):
        texts = _cuda.ranked(_cuda_sizes(call))
    else:
        return []
    return [f"{plan} {text}" for text in texts[:_MOST_CONFIGS]]


def _cuda_sizes(call: ConvCall) -> _cuda.Sizes:
    shape = call.shape
    return _cuda.Sizes(
        x=(shape.batch, shape.in_channels, *call.in_size),
        out_channels=shape.out_channels,
        kernel_size=shape.kernel,
        stride=shape.stride,
        padding=call.padding,
        dilation=shape.dilation,
        groups=shape.groups,
        shortcut_x=(),
        shortcut_stride=(1, 1),
        kind=_cuda.kind_of(shape.dtype),
        device=shape.index,
    )


def _row_of(f: _Found, m: Measured, plans: Sequence[str], by_rule: str) -> Row:
    """Each plan stands for the fastest of its configurations; its own choice goes first."""
    best: dict[str, str] = {}
    for name, ms in m.ms.items():
        plan, _ = split_name(name)
        at = best.get(plan)
        if at is None or (ms is not None and (m.ms[at] is None or ms < MARGIN * m.ms[at])):
            best[plan] = name
    plan, _ = split_name(m.plan)
    best[plan] = m.plan
    configs = {p: split_name(name)[1] for p, name in best.items() if split_name(name)[1]}
    ms = {p: m.ms[best[p]] if p in best else None for p in plans}
    errors = {p: m.errors[best[p]] for p in plans if p in best}
    return Row(f.call.shape, f.count, ms, errors, plan, by_rule, configs)


def _time(ms: float | None) -> str:
    return "inexact" if ms is None else milliseconds(ms).removesuffix(" ms")
