"""The plans of one convolution beside each other, each by the fastest of its configurations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .. import select
from ..ops import _cuda, _triton
from ..select import ConvShape
from .candidates import MARGIN, ConvCall, Measured, measure, pools_at_once, split_name
from .convolutions import Found

MOST_CONFIGS = 8  # of a plan: those with the least estimated time, each takes a second to compile


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


def measure_convolution(
    found: Found,
    *,
    allow: Sequence[str] = (),
    weight_bytes: int = 0,
    seconds: float = 1.0,
    on_round: Callable[[int, int], None] = lambda done, total: None,
    without: Collection[str] = (),
) -> Row:
    """Measures every plan that can compute it; arguments and errors are those of `measure`.

    without: candidates that are known to fail here; their plans count as inexact.
    """
    call, shape = found.call, found.call.shape
    by_rule = select.by_rule(shape).plan
    plans = select.candidates(shape, allow=allow)
    names = [name for name in worth_measuring(call, plans) if name not in without]
    if len(plans) == 1 or not names:
        return Row(shape, found.count, {}, {}, plans[0], by_rule)
    m = measure(
        call,
        names,
        by_rule,
        allow=allow,
        weight_bytes=weight_bytes,
        seconds=seconds,
        on_round=on_round,
    )
    return _row(found, m, plans, by_rule)


def worth_measuring(call: ConvCall, plans: Sequence[str]) -> list[str]:
    """Candidates: the plans as they choose themselves, then their likely configurations."""
    return [*plans, *(name for plan in plans for name in _configured(plan, call))]


def _configured(plan: str, call: ConvCall) -> list[str]:
    """Configurations of a plan that are worth measuring, as candidates; GPU kernels have some."""
    if plan == "triton":
        texts = _triton.configs(call.shape, call.in_size, call.padding, call.act, call.residual)
    elif plan == "cuda" and not pools_at_once(call, plan):
        texts = _cuda.ranked(_cuda_sizes(call))
    else:
        return []
    return [f"{plan} {text}" for text in texts[:MOST_CONFIGS]]


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


def _row(found: Found, m: Measured, plans: Sequence[str], by_rule: str) -> Row:
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
    return Row(found.call.shape, found.count, ms, errors, plan, by_rule, configs)
