"""Errors against float64: how large they are, and how large ours may be."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

CHUNK = 8  # images at a time in fp64, which needs twice the memory
# Relative L2 error that is granted however exact eager is. float32: the bound of a Winograd kernel;
# the others: a rounding of the last bit of every value.
GRANTED = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}


def exact_logits(model: nn.Module, x: Tensor) -> Tensor:
    """The plain net's logits for x (N, C, H, W) in fp64, from the same weights: (N, classes)."""
    wide = copy.deepcopy(model).double().eval()
    with torch.inference_mode():
        return torch.cat([wide(chunk.double()) for chunk in x.split(CHUNK)])


def relative_error(y: Tensor, exact: Tensor) -> float:
    """||y - exact|| / ||exact|| over all elements; inf where shapes differ or y is not finite."""
    if y.shape != exact.shape or not bool(torch.isfinite(y).all()):
        return float("inf")
    return float((y.double() - exact).norm() / exact.norm())


def largest_difference(y: Tensor, exact: Tensor) -> float:
    """max |y - exact|, in the logits' own unit."""
    return float((y.double() - exact).abs().max())


def error_limit(eager_error: float, dtype: torch.dtype) -> float:
    """For a convolution or a whole net: twice eager's own in the dtype, or what that is granted."""
    return max(2 * eager_error, GRANTED[dtype])
