"""Which implementation runs a convolution, and the sentence that says why.

A plan names the implementation and with it the layout of the packed weights:

    direct     our implicit GEMM (csrc/cpu/direct.h)
    winograd4  our fused Winograd F(4x4, 3x3) (csrc/cpu/winograd.h)
    winograd2  our fused Winograd F(2x2, 3x3)
    torch      PyTorch's own convolution, then the whole epilogue in one pass

The rule looks at the weights and the size of the map, not at the batch. How a plan cuts the work
into jobs is decided inside the op from the real shape, so that one packed weight and one compiled
graph serve every batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .check import PLANS, dtype_name
from .ops import _library as ops

FORCE_VARIABLE = "RESNET_FUSED_FORCE"
EXACT_VARIABLE = "RESNET_FUSED_EXACT_NONFINITE"
FORCES = ("none", "ours", *PLANS)


def _check_force(plan: str, where: str) -> str:
    if plan not in FORCES:
        raise ValueError(f"{where} must be one of {', '.join(FORCES)}, got {plan!r}")
    return plan


_EXACT_NONFINITE = os.environ.get(EXACT_VARIABLE, "0") not in ("", "0")

# The last entry counts. A plain list, because torch.compile can trace and guard one.
_forced = [_check_force(os.environ.get(FORCE_VARIABLE) or "none", FORCE_VARIABLE)]


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
    """The plan in force, "none" if the rule decides."""
    return _forced[-1]


def choose(shape: ConvShape, *, packed_once: bool = True, exact_nonfinite: bool = False) -> Choice:
    """The plan for a convolution on this machine.

    packed_once: the packed weights will serve many calls, so that transforming them costs nothing.
    exact_nonfinite: NaN, Inf and values near overflow must stay where a direct convolution puts
        them.
    """
    missing = _cannot_run_ours(shape)
    word = force()
    if missing:
        return Choice("torch", missing)
    if word == "torch":
        return Choice("torch", "forced to torch")
    if word.startswith("winograd") and _is_winograd(shape):
        return Choice(word, f"forced to {word}")
    if word == "direct" or word.startswith("winograd"):
        return Choice("direct", f"forced to {word}")
    if word != "ours":
        reason = _why_torch(shape)
        if reason:
            return Choice("torch", reason)
    return _ours(shape, packed_once, exact_nonfinite or _EXACT_NONFINITE)


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
# CPU instructions with which PyTorch's convolution multiplies bfloat16 2 to 16 times as fast as our
# kernel, which computes in float32. (Its float16 is slower than its float32, AVX512-FP16 or not.)
_FAST_16BIT = {torch.bfloat16: ("amx_bf16", "avx512_bf16")}


def _why_torch(shape: ConvShape) -> str:
    for feature in _FAST_16BIT.get(shape.dtype, ()):
        if feature in ops.CPU_FEATURES:
            name = dtype_name(shape.dtype)
            return f"PyTorch multiplies {name} with {feature}, our kernel in float32"
    group_out = shape.out_channels // shape.groups
    if shape.groups > 1 and group_out < _MIN_GROUP_OUT:
        return f"{group_out} output channels a group are less than half a panel"
    return ""


def _is_winograd(shape: ConvShape) -> bool:
    return (shape.kernel, shape.stride, shape.dilation, shape.groups) == ((3, 3), (1, 1), (1, 1), 1)


# The cost of a plan, in multiplications per pair of input and output channel, for one image: its
# points times its tiles, but at least as many tiles as take the time of loading a point's weights:
# 12 where the weights pass through from L3 (about 3 multiplications a byte: 83 GMAC/s and 24 GB/s a
# core), 4 where they stay in L2 and only the latency of the multiplier must be filled.
_TILES_OF_A_LOAD_L3 = 12
_TILES_OF_A_LOAD_L2 = 4
_L2_BYTES = 1 << 20
# Transforms take a tenth to a fifth of a Winograd convolution's time. They pay at any channel
# count: with 4 channels and 56 x 56 pixels F(4x4) takes 41 us, the direct kernel 59.
_TRANSFORMS = 1.25
# plan -> (points of a tile, side of a tile in output pixels)
_TILINGS = {"direct": (9, 1), "winograd2": (16, 2), "winograd4": (36, 4)}


def _cost(plan: str, shape: ConvShape) -> float:
    points, side = _TILINGS[plan]
    tiles = -(-shape.out_size[0] // side) * -(-shape.out_size[1] // side)
    weights = points * shape.in_channels * shape.out_channels * 4
    least = _TILES_OF_A_LOAD_L2 if weights <= _L2_BYTES else _TILES_OF_A_LOAD_L3
    return points * max(tiles, least) * (1 if plan == "direct" else _TRANSFORMS)


def _ours(shape: ConvShape, packed_once: bool, exact_nonfinite: bool) -> Choice:
    if not _is_winograd(shape):
        return Choice("direct", "implicit GEMM over packed weights")
    if exact_nonfinite:
        return Choice("direct", "exact_nonfinite keeps NaN and Inf where they belong")
    if not packed_once:
        return Choice("direct", "weights that are packed for one call are not worth transforming")
    direct, *winograd = (_cost(plan, shape) for plan in _TILINGS)
    if direct <= min(winograd):
        return Choice("direct", "too few pixels to pay for loading transformed weights")
    plan = "winograd2" if winograd[0] <= winograd[1] else "winograd4"
    return Choice(
        plan, f"3x3, stride 1: {min(winograd) / direct:.0%} of the direct convolution's cost"
    )
