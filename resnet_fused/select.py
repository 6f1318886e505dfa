"""Which implementation runs a convolution, and the sentence that says why.

A plan names the implementation and with it the layout of the packed weights:

    direct   our implicit GEMM (csrc/cpu/direct.h)
    torch    PyTorch's own convolution, then the whole epilogue in one pass

The rule looks only at what is known when weights are packed. How a plan cuts the work into jobs is
decided inside the op from the real shape, so that one packed weight and one compiled graph serve
every batch and image size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import ops
from .check import PLANS, dtype_name

FORCE_VARIABLE = "RESNET_FUSED_FORCE"
FORCES = ("none", "ours", *PLANS)



def _check_force(plan: str, where: str) -> str:
    if plan not in FORCES:
        raise ValueError(f"{where} must be one of {', '.join(FORCES)}, got {plan!r}")
    return plan


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
        return f"{self.plan} ({ops.cpu_isa()})" if self.plan == "direct" else self.plan


@contextmanager
def forced(plan: str) -> Iterator[None]:
    """Within the block every choice is `plan`: "ours", "torch", a plan's name; "none" lifts a force.

    For the whole process, like the environment variable RESNET_FUSED_FORCE, which sets it from the
    start. "ours" takes our own kernel wherever one can run. Raises ValueError for any other word.
    """
    _forced.append(_check_force(plan, "forced: plan"))
    try:
        yield
    finally:
        _forced.pop()


def force() -> str:
    """The plan in force, "none" if the rule decides."""
    return _forced[-1]


def choose(shape: ConvShape) -> Choice:
    """The plan for a convolution on this machine."""
    missing = _cannot_run_direct(shape)
    word = force()
    if missing:
        return Choice("torch", missing)
    if word in ("ours", "direct"):
        return Choice("direct", f"forced to {word}")
    if word == "torch":
        return Choice("torch", "forced to torch")
    return _cpu_rule(shape)


def _cannot_run_direct(shape: ConvShape) -> str:
    if shape.device != "cpu":
        return f"no kernel of ours for {shape.device}"
    if ops.extension_error is not None:
        return f"the C++ extension is not loaded: {ops.extension_error}"
    if shape.dtype == torch.float64:
        return "float64 runs on PyTorch's convolution"
    return ""


# Below this many output channels per group most lanes of a 32-channel panel would multiply zeros.
_MIN_GROUP_OUT = 16
# CPU instructions with which PyTorch's convolution multiplies 16-bit operands 2 to 16 times as fast
# as our kernel, which computes in float32.
_FAST_16BIT = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16"),
    torch.float16: ("avx512_fp16",),
}


def _cpu_rule(shape: ConvShape) -> Choice:
    for feature in _FAST_16BIT.get(shape.dtype, ()):
        if feature in ops.CPU_FEATURES:
            name = dtype_name(shape.dtype)
            return Choice("torch", f"PyTorch multiplies {name} with {feature}, our kernel in float32")
    group_out = shape.out_channels // shape.groups
    if shape.groups > 1 and group_out < _MIN_GROUP_OUT:
        return Choice("torch", f"{group_out} output channels a group are less than half a panel")
    return Choice("direct", "implicit GEMM over packed weights, epilogue in registers")
