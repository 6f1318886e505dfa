"""The rule that chooses a plan on a GPU where nothing was measured.

By derivation, until `tune` has measured: our kernels store a convolution's output once, PyTorch's
three times (convolution, batch norm, activation). Without tensor cores there is no kernel of ours
that could keep up with cuDNN's.
"""

from __future__ import annotations

import torch

from .backends import can_compute, missing, uses_tf32
from .conv_shape import Choice, ConvShape

# Fewer channels per group than a tensor core multiplies at a time.
_MIN_GROUP_CUDA = 16


def why_torch(shape: ConvShape) -> str:
    if shape.dtype == torch.float32 and not uses_tf32():
        return "float32 without TF32 has no tensor cores, and PyTorch's convolution leads there"
    group = min(shape.in_channels, shape.out_channels) // shape.groups
    if shape.groups > 1 and group < _MIN_GROUP_CUDA:
        return f"{group} channels a group are fewer than a tensor core multiplies at a time"
    return ""


def ours(shape: ConvShape, exact_nonfinite: bool) -> Choice:
    """Triton first: hand-written kernels can be wrong where its compiler cannot, and no GPU has run
    them yet. `tune`, which verifies before it measures, takes them where they win."""
    if can_compute("triton", shape):
        return Choice("triton", "implicit GEMM on tensor cores")
    return Choice(
        "cuda", f"implicit GEMM on tensor cores; {missing('triton', shape.device, shape.index)}"
    )
