"""The rule that chooses a plan on a GPU where nothing was measured.

Our kernels store a convolution's output once, PyTorch's three times (convolution, batch norm,
activation): on an H100 ours won every convolution of ResNet-18 and 50 against that in bfloat16.
Without tensor cores there is no kernel of ours that could keep up with cuDNN's, by derivation.
"""

from __future__ import annotations

import torch

from .backends import can_compute, uses_tf32, why_not
from .conv_shape import Choice, ConvShape

# Fewer channels per group than a tensor core multiplies at a time.
_MIN_GROUP_CUDA = 16


def why_torch(shape: ConvShape, _ours: str) -> str:
    """Why PyTorch's convolution goes before any plan of ours, "" where ours stays."""
    if shape.dtype == torch.float32 and not uses_tf32():
        return "float32 without TF32 has no tensor cores, and PyTorch's convolution leads there"
    group = min(shape.in_channels, shape.out_channels) // shape.groups
    if shape.groups > 1 and group < _MIN_GROUP_CUDA:
        return f"{group} channels a group are fewer than a tensor core multiplies at a time"
    return ""


def ours(shape: ConvShape, exact_nonfinite: bool) -> Choice:
    """CUDA C++ first in 16 bits; float32 with TF32 stays with Triton, whose compiler has wgmma for
    it on Hopper where csrc/cuda has mma.sync alone: which is faster there was not measured."""
    plans = ("triton", "cuda") if shape.dtype == torch.float32 else ("cuda", "triton")
    first, other = plans
    if can_compute(first, shape):
        return Choice(first, "implicit GEMM on tensor cores")
    return Choice(other, f"implicit GEMM on tensor cores; {why_not(first, shape)}")
