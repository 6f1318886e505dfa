"""PyTorch's fastest convolution on a CPU: oneDNN with prepacked weights, as inductor's freezing uses.

Batch norm is folded into the weights, addition and ReLU run in oneDNN's own epilogue, operands are
channels_last and the weights lie in the layout that oneDNN asks for at this input shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused.packing import conv_keywords, fold
from resnet_fused.recipe import ConvUnit

_ops = torch.ops.mkldnn


def is_available(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or _ops._is_mkldnn_bf16_supported()


def prepacked(
    unit: ConvUnit, dtype: torch.dtype, x: Tensor, residual: Tensor | None, copies: int = 1
) -> Callable[[], Tensor]:
    """A call that computes the unit on x (N, C, H, W); its weights are `copies` equal ones in turn."""
    scale, shift = fold(unit)
    weight = (unit.conv.weight.double() * scale.double()[:, None, None, None]).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    keywords = conv_keywords(unit)
    geometry = [list(keywords["padding"]), list(keywords["stride"]), list(keywords["dilation"])]
    geometry.append(keywords["groups"])
    weights = [
        _ops._reorder_convolution_weight(weight, *geometry, list(x.shape)) for _ in range(copies)
    ]
    bias = shift.to(dtype)
    relu = keywords["act"] == "relu"
    turn = -1

    def call() -> Tensor:
        nonlocal turn
        turn = (turn + 1) % copies
        if residual is None:
            act = "relu" if relu else "none"
            return _ops._convolution_pointwise(x, weights[turn], bias, *geometry, act, [], "")
        act = "relu" if relu else None
        return _ops._convolution_pointwise.binary(
            x, residual, weights[turn], bias, *geometry, "add", 1.0, act, [], None
        )

    return call
