"""Which implementation runs a convolution, and the sentence that says why.

A plan names the implementation and with it the layout of the packed weights:

    direct     our implicit GEMM (csrc/cpu/direct.h)
    winograd4  our fused Winograd F(4x4, 3x3) (csrc/cpu/winograd.h)
    winograd2  our fused Winograd F(2x2, 3x3)
    winograd5  our fused Winograd F(5x5, 3x3); only for those who ask for it: error up to 4e-6
    winograd4s2, winograd2s2  the same for stride 2, split by parity (polyphase)
    stem       our Winograd along the rows of 7x7 kernels with stride 2 (csrc/cpu/stem.h), with a
               max-pool behind it in the same pass
    *_bf16     the same with products of bfloat16 (avx512_bf16) instead of float32
    torch      PyTorch's own convolution, then the whole epilogue in one pass

What each demands of a convolution is a row of check.PLAN_TRAITS; `candidates` are those that can
compute one here. Among them `choose` takes, in this order: the plan that is forced; the fastest
that `tune` measured on this machine; the one that the rule below names.

The rule looks at the weights, the size of the map and, where there are too few pixels to hide the
loading of transformed weights, the batch. How a plan cuts the work into jobs is decided inside the
op from the real shape, so that packed weights and compiled graphs serve every batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from . import guard, tuned
from .check import PLAN_TRAITS, PLANS, dtype_name, fits_plan
from .ops import _library as ops

FORCE_VARIABLE = "RESNET_FUSED_FORCE"
EXACT_VARIABLE = "RESNET_FUSED_EXACT_NONFINITE"
FORCES = ("none", "ours", *PLANS)


_EXACT_NONFINITE = os.environ.get(EXACT_VARIABLE, "0") not in ("", "0")

# The last entry counts. A plain list, because torch.compile can trace and guard one. The first is
# checked when it is used, so that the package can be imported and the doctor can tell.
_forced = [os.environ.get(FORCE_VARIABLE) or "none"]


def _check_force(plan: str, where: str) -> str:
    if plan not in FORCES:
        raise ValueError(f"{where} must be one of {', '.join(FORCES)}, got {plan!r}")
    return plan


@dataclass(frozen=True)
class ConvShape:
    """What a convolution is, as far as the choice depends on it. Sizes in elements."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype  # of the computation: autocast's, where autocast is on
    in_channels: int
    out_channels: int
    kernel: tuple[int, int]
    out_size: tuple[int, int]  # rows and columns of the output
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch: int = 1

    def __str__(self) -> str:
        """The key of tuned answers, "3x3 64->128 to 28x28 stride 2x2 float32 cpu": no batch."""
        text = (
            f"{self.kernel[0]}x{self.kernel[1]} {self.in_channels}->{self.out_channels} "
            f"to {self.out_size[0]}x{self.out_size[1]}"
        )
        if self.stride != (1, 1):
            text += f" stride {self.stride[0]}x{self.stride[1]}"
        if self.dilation != (1, 1):
            text += f" dilation {self.dilation[0]}x{self.dilation[1]}"
        if self.groups != 1:
            text += f" groups {self.groups}"
        return f"{text} {dtype_name(self.dtype)} {self.device}"


@dataclass(frozen=True)
class Choice:
    """plan: the layout to pack; reason: why."""

    plan: str
    reason: str

    @property
    def backend(self) -> str:
        """What runs the plan here, for reports: "direct (avx512)"."""
        return self.plan if self.plan == "torch" else f"{self.plan} ({ops.cpu_isa()})"


@contextmanager
def forced(plan: str) -> Iterator[None]:
    """Within the block every choice is `plan`: "ours" or a plan's name; "none" lifts a force.

    For the whole process, like the environment variable RESNET_FUSED_FORCE, which sets it from the
    start. "ours" takes our own kernels wherever one can run; a plan
    that cannot compute a convolution gives way to "direct". Raises ValueError for any other word.
    """
    _forced.append(_check_force(plan, "forced: plan"))
    try:
        yield
    finally:
        _forced.pop()


def force() -> str:
    """The plan in force, "none" if nothing is. Raises ValueError for a bad RESNET_FUSED_FORCE."""
    return _check_force(_forced[-1], FORCE_VARIABLE)


def state() -> tuple[Any, ...]:
    """All that a choice depends on beside its arguments, cheaply: equal means the same choices."""
    return (force(), tuned.state())


def facts() -> list[guard.Fact]:
    """As `state`, for a guard."""
    return [
        guard.item_is(globals(), "_forced", _forced),
        guard.returns(_forced.copy, list(_forced)),
        *tuned.facts(),
    ]


def candidates(
    shape: ConvShape, *, exact_nonfinite: bool = False, allow: Iterable[str] = ()
) -> tuple[str, ...]:
    """The plans that can compute a convolution here, in the order of check.PLANS.

    exact_nonfinite: only those that keep NaN, Inf and values near overflow where they belong.
    allow: opt-in plans that may be among them, whose error is above a convolution's usual bound.
    """
    if _cannot_run_ours(shape):
        return ("torch",)
    allow = tuple(allow)
    return tuple(
        [
            plan
            for plan in PLANS
            if _can_compute(plan, shape)
            and not (exact_nonfinite and PLAN_TRAITS[plan].spreads)
            and (plan in allow or not PLAN_TRAITS[plan].opt_in)
        ]
    )


def _can_compute(plan: str, shape: ConvShape) -> bool:
    traits = PLAN_TRAITS[plan]
    if shape.dtype not in traits.dtypes:
        return False
    if traits.isa and traits.isa != ops.cpu_isa():
        return False
    return fits_plan(plan, shape.kernel, shape.stride, shape.dilation, shape.groups)


def choose(shape: ConvShape, *, exact_nonfinite: bool = False) -> Choice:
    """The plan for a convolution on this machine: what is forced, else measured, else by rule.

    exact_nonfinite: NaN, Inf and values near overflow must stay where a direct convolution puts
        them.
    Raises ValueError for a bad RESNET_FUSED_FORCE.
    """
    word = force()
    exact_nonfinite = exact_nonfinite or _EXACT_NONFINITE
    if word in PLANS and not _cannot_run_ours(shape):
        return Choice(word if _can_compute(word, shape) else "direct", f"forced to {word}")
    if word == "none":
        measured = _by_measurement(shape, exact_nonfinite)
        if measured is not None:
            return measured
    return by_rule(shape, ours=word == "ours", exact_nonfinite=exact_nonfinite)


def _by_measurement(shape: ConvShape, exact_nonfinite: bool) -> Choice | None:
    """The fastest plan that was measured, None unless all that come into question were."""
    answers = tuned.answers()
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
    listed = ", ".join([f"{plan} {milliseconds(ms)}" for _, ms, plan in ranks])
    return Choice(ranks[0][2], f"tuned on this machine at batch {answer.batch}: {listed}")


def milliseconds(ms: float) -> str:
    """Three digits and the unit, "0.312 ms"."""
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms:.0f} ms"


def _has_one_size(shape: ConvShape) -> bool:
    """False in a graph that is captured for every size of the map."""
    return is_static(shape.out_size[0]) and is_static(shape.out_size[1])


def is_static(size: int) -> bool:
    """Whether a size is one number: not in a graph that is captured for all of them."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return has_static_value(size)


def by_rule(
    shape: ConvShape,
    *,
    ours: bool = False,
    exact_nonfinite: bool = False,
) -> Choice:
    """What `choose` says where nothing was measured; ours: wherever a kernel of ours can run."""
    missing = _cannot_run_ours(shape)
    reason = missing or ("" if ours else _why_torch(shape))
    if reason:
        return Choice("torch", reason)
    return _ours(shape, exact_nonfinite)


def _cannot_run_ours(shape: ConvShape) -> str:
    if shape.device != "cpu":
        return f"no kernel of ours for {shape.device}"
    if ops.extension_error is not None:
        return f"the C++ extension is not loaded: {ops.extension_error}"
    if shape.dtype == torch.float64:
        return "float64 runs on PyTorch's convolution"
    return ""


# Below this many output channels per group most lanes of a 32-channel panel would multiply zeros.
_MIN_GROUP_OUT = 16


def _why_torch(shape: ConvShape) -> str:
    if shape.dtype == torch.bfloat16 and "amx_bf16" in ops.CPU_FEATURES:
        # Matrix units: 8 times the products of our kernels' vectors.
        return "PyTorch multiplies bfloat16 with amx_bf16, our kernel with vectors"
    group_out = shape.out_channels // shape.groups
    if shape.groups > 1 and group_out < _MIN_GROUP_OUT:
        return f"{group_out} output channels a group are less than half a panel"
    return ""


# The cost of a plan, in multiplications per image and pair of input and output channel: its points
# times its tiles, but at least as many tiles as take the time of loading a point's weights: 15
# where these come from memory (115 GMAC/s and 31 GB/s), 12 where they pass through from L3 (about 3
# multiplications a byte), 4 where they stay in L2 and only the latency of the multiplier must be
# filled. Products of bfloat16 take half the time, and so do their weights.
_TILES_OF_A_LOAD = ((1 << 20, 4), (16 << 20, 12))  # weights up to so many bytes: tiles
_TILES_OF_A_LOAD_FROM_MEMORY = 15
# Transforms take a tenth to a fifth of a Winograd convolution's time. They pay at any channel
# count: with 4 channels and 56 x 56 pixels F(4x4) takes 41 us, the direct kernel 59.
_TRANSFORMS = 1.25
# plan -> (products of a tile, side of a tile in output pixels, time of a product)
_COSTS = {
    "direct": (9, 1, 1.0),
    "winograd2": (16, 2, _TRANSFORMS),
    "winograd4": (36, 4, _TRANSFORMS),
    "winograd2s2": (25, 2, _TRANSFORMS),
    "winograd4s2": (81, 4, _TRANSFORMS),
    "direct_bf16": (9, 1, 0.5),
    "winograd2_bf16": (16, 2, _TRANSFORMS / 2),
    "winograd2s2_bf16": (25, 2, _TRANSFORMS / 2),
}


def _cost(plan: str, shape: ConvShape) -> float:
    points, side, time = _COSTS[plan]
    tiles = shape.batch * -(-shape.out_size[0] // side) * -(-shape.out_size[1] // side)
    weights = points * shape.in_channels * shape.out_channels * (2 if time < 1 else 4)
    least = _TILES_OF_A_LOAD_FROM_MEMORY
    for size, count in reversed(_TILES_OF_A_LOAD):
        if weights <= size:
            least = count
    return points * max(tiles, least) * time / max(shape.batch, 1)


# The stem's kernel multiplies 13 rows for 4 of output where a direct convolution has 28. Measured
# with 1 to 256 input channels and maps up to 1080 x 1920 it takes 0.43 to 0.67 of the direct
# kernel's time, 0.9 at 4 rows of output, as much at 2.
_STEM_LEAST_ROWS = 3
# bfloat16 pairs halve a direct convolution's products, too, but with an odd number of channels a
# tap's last pair is half empty, and of few channels the gathering takes much.
_STEM_MOST_CHANNELS_BF16 = 4


def _stem(shape: ConvShape, direct: str) -> Choice:
    if shape.out_size[0] < _STEM_LEAST_ROWS:
        return Choice(direct, "too few rows to pay for Winograd along them")
    if direct == "direct_bf16" and shape.in_channels > _STEM_MOST_CHANNELS_BF16:
        return Choice(direct, "pairs of bfloat16 have no more products than Winograd along rows")
    return Choice("stem", "7 rows of taps, stride 2: 13 products where the direct one has 28")


def _ours(shape: ConvShape, exact_nonfinite: bool) -> Choice:
    able = [plan for plan in _COSTS if _can_compute(plan, shape)]
    direct = "direct_bf16" if "direct_bf16" in able else "direct"
    winograd = [plan for plan in able if PLAN_TRAITS[plan].spreads]
    stem = _can_compute("stem", shape)
    if not winograd and not stem:
        return Choice(direct, "implicit GEMM over packed weights")
    if exact_nonfinite:
        return Choice(direct, "exact_nonfinite keeps NaN and Inf where they belong")
    if stem:
        return _stem(shape, direct)
    best, least, limit = direct, _cost(direct, shape), _cost(direct, shape)
    for plan in winograd:
        cost = _cost(plan, shape)
        if cost < least:
            best, least = plan, cost
    if best == direct:
        return Choice(direct, "too few pixels to pay for loading transformed weights")
    side = shape.stride[0]
    # A graph that is captured for every size knows no number, and nobody reads its reason.
    share = "less than" if torch.compiler.is_compiling() else f"{least / limit:.0%} of"
    return Choice(best, f"3x3, stride {side}: {share} the direct convolution's cost")
