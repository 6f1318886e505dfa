"""Which implementation runs a convolution, and the sentence that says why.

A plan names the implementation and with it the layout of the packed weights:

    direct     our implicit GEMM (csrc/cpu/direct.h)
    winograd4  our fused Winograd F(4x4, 3x3) (csrc/cpu/winograd.h)
    winograd4_raw  the same from kernels as they are, transformed when they are used
               (csrc/cpu/winograd_raw_body.h)
    winograd2  our fused Winograd F(2x2, 3x3)
    winograd5  our fused Winograd F(5x5, 3x3); only for those who ask for it: error up to 4e-6
    winograd4s2, winograd2s2  the same for stride 2, split by parity (polyphase)
    stem       our Winograd along the rows of 7x7 kernels with stride 2 (csrc/cpu/stem.h), with a
               max-pool behind it in the same pass
    *_bf16     the same with products of bfloat16 (avx512_bf16) instead of float32
    triton     our implicit GEMM in Triton (triton_kernels/), on a GPU
    cuda       our implicit GEMM in CUDA C++ (csrc/cuda/), on a GPU
    torch      PyTorch's own convolution, then the whole epilogue in one pass

What each demands of a convolution is a row of check.PLAN_TRAITS; `candidates` are those that can
compute one here. Among them `choose` takes, in this order: the plan that is forced; the fastest
that `tune` measured on this machine; the one that a rule names.

The rules are in _cpu_rule and _cuda_rule. How a plan cuts the work into jobs or tiles is decided
inside the op from the real shape, so that packed weights and compiled graphs serve every batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import _cpu_rule, _cuda_rule, _environment, backends, check, guard, tuned
from ._tables import time_text
from .backends import can_compute
from .check import PLAN_TRAITS, PLANS
from .conv_shape import Choice, ConvShape, is_static

__all__ = [
    "FORCES",
    "Choice",
    "ConvShape",
    "by_rule",
    "candidates",
    "choose",
    "force",
    "forced",
    "is_static",
]

FORCES = ("none", "ours", *PLANS)

_EXACT_NONFINITE = _environment.is_set(_environment.EXACT_NONFINITE)

# The last entry counts. A plain list, because torch.compile can trace and guard one. The first is
# checked when it is used, so that the package can be imported and the doctor can tell.
_forced = os.environ.get(_environment.FORCE) or "none"


def _check_force(plan: str, where: str) -> str:
    if plan not in FORCES:
        raise ValueError(f"{where} must be one of {', '.join(FORCES)}, got {plan!r}")
    return plan


@contextmanager
def forced(plan: str) -> Iterator[None]:
    """Within the block every choice is `plan`: "ours" or a plan's name; "none" lifts a force.

    For the whole process, like the environment variable RESNET_FUSED_FORCE, which sets it from the
    start. "ours" takes our own kernels wherever one can run; a plan that cannot compute a
    convolution, or not as `exact_nonfinite` asks, gives way to "direct" on the CPU, to any of ours
    on a GPU. Raises ValueError for any other word.
    """
    global _forced
    before, _forced = _forced, _check_force(plan, "forced: plan")
    try:
        yield
    finally:
        _forced = before


def force() -> str:
    """The plan in force, "none" if nothing is. Raises ValueError for a bad RESNET_FUSED_FORCE."""
    return _check_force(_forced, _environment.FORCE)


def state() -> tuple[Any, ...]:
    """All that a choice depends on beside its arguments, cheaply: equal means the same choices."""
    return (force(), tuned.state(), backends.uses_tf32())


def facts(device: str) -> list[guard.Fact]:
    """As `state`, for a guard of choices for devices of that type."""
    found = [guard.item_equals(globals(), "_forced", _forced), *tuned.facts()]
    if device != "cpu" or _environment.INTERPRETED:
        found.append(guard.returns(backends.uses_tf32, backends.uses_tf32()))  # 24 us, cold
    return found


def candidates(
    shape: ConvShape, *, exact_nonfinite: bool = False, allow: Iterable[str] = ()
) -> tuple[str, ...]:
    """The plans that can compute a convolution here, in the order of check.PLANS.

    exact_nonfinite: only those that keep NaN, Inf and values near overflow where they belong.
    allow: opt-in plans that may be among them, whose error is above a convolution's usual bound.
    """
    allow = tuple(allow)
    return tuple(
        [
            plan
            for plan in check.plans_of(shape.device)
            if can_compute(plan, shape)
            and not (exact_nonfinite and PLAN_TRAITS[plan].spreads)
            and (plan in allow or not PLAN_TRAITS[plan].opt_in)
        ]
    )


def choose(shape: ConvShape, *, exact_nonfinite: bool = False) -> Choice:
    """The plan for a convolution on this machine: what is forced, else measured, else by rule.

    exact_nonfinite: NaN, Inf and values near overflow must stay where a direct convolution puts
        them.
    Raises ValueError for a bad RESNET_FUSED_FORCE, TypeError unless shape is a ConvShape.
    """
    if not isinstance(shape, ConvShape):
        raise TypeError(f"choose: shape must be a ConvShape, got {type(shape).__name__}")
    word = force()
    exact_nonfinite = exact_nonfinite or _EXACT_NONFINITE
    if word in PLANS:
        spreads = exact_nonfinite and PLAN_TRAITS[word].spreads
        if can_compute(word, shape) and not spreads:
            return Choice(word, f"forced to {word}")
        if not _cannot_run_ours(shape):
            return Choice(_any_of_ours(shape), f"forced to {word}")
    if word == "none":
        measured = _by_measurement(shape, exact_nonfinite)
        if measured is not None:
            return measured
    return by_rule(shape, ours=word == "ours", exact_nonfinite=exact_nonfinite)


def _by_measurement(shape: ConvShape, exact_nonfinite: bool) -> Choice | None:
    """The fastest plan that was measured, None unless all that come into question were."""
    answers = tuned.answers(shape.device, shape.index)
    if not answers or not _has_one_size(shape):
        return None
    answer = answers.get(str(shape))
    if answer is None:
        return None
    able = candidates(shape, exact_nonfinite=exact_nonfinite, allow=answer.ms)
    if not set(able).issubset(answer.ms):
        return None  # a kernel that came later
    ranks = sorted([(p != answer.plan, answer.ms[p], p) for p in able if answer.ms[p] is not None])
    if not ranks:
        return None
    listed = ", ".join([f"{plan} {time_text(ms)}" for _, ms, plan in ranks])
    return Choice(ranks[0][2], f"tuned on this machine at batch {answer.batch}: {listed}")


def _has_one_size(shape: ConvShape) -> bool:
    """False in a graph that is captured for every size of the map."""
    return is_static(shape.out_size[0]) and is_static(shape.out_size[1])


def by_rule(
    shape: ConvShape,
    *,
    ours: bool = False,
    exact_nonfinite: bool = False,
) -> Choice:
    """What `choose` says where nothing was measured; ours: wherever a kernel of ours can run."""
    rule = _cuda_rule if shape.device == "cuda" else _cpu_rule
    reason = _cannot_run_ours(shape)
    if reason:
        return Choice("torch", reason)
    best = rule.ours(shape, exact_nonfinite)
    reason = "" if ours else rule.why_torch(shape, best.plan)
    return Choice("torch", reason) if reason else best


def _cannot_run_ours(shape: ConvShape) -> str:
    if shape.device not in ("cpu", "cuda"):
        return f"no kernel of ours for {shape.device}"
    plans = ("direct",) if shape.device == "cpu" else ("cuda", "triton")
    reasons = [backends.why_not(plan, shape) for plan in plans]
    if all(reasons):
        return "; ".join(dict.fromkeys(reasons))
    if shape.dtype == torch.float64:
        return "float64 runs on PyTorch's convolution"
    return ""


def _any_of_ours(shape: ConvShape) -> str:
    """Where there is a kernel of ours, one that can compute any convolution."""
    if shape.device == "cpu":
        return "direct"
    return "cuda" if can_compute("cuda", shape) else "triton"
