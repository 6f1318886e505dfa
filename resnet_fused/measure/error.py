"""Error of a net's logits against the same net in fp64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

CHUNK = 8  # images at a time in fp64, which needs twice the memory


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
    """What a fused net may have: twice eager's own error, in fp32 at least 2e-6."""
    return max(2 * eager_error, 2e-6) if dtype == torch.float32 else 2 * eager_error
