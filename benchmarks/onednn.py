"""PyTorch's fastest convolution on a CPU: oneDNN with prepacked weights, as inductor freezes it.

Batch norm is folded into the weights, addition and ReLU run in oneDNN's own epilogue, operands are
channels_last, and the weights lie in the layout that oneDNN asks for at this input shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from resnet_fused.packing import conv_keywords, fold
from resnet_fused.recipe import ConvUnit

_ops = torch.ops.mkldnn
_SUPPORTED = {
    torch.float32: lambda: True,
    torch.bfloat16: lambda: _ops._is_mkldnn_bf16_supported(),
    torch.float16: lambda: _ops._is_mkldnn_fp16_supported(),
}


def is_available(dtype: torch.dtype) -> bool:
    return torch.backends.mkldnn.is_available() and _SUPPORTED[dtype]()


def prepacked(
    unit: ConvUnit, dtype: torch.dtype, x: Tensor, residual: Tensor | None, copies: int = 1
) -> dict[str, Callable[[], Tensor]]:
    """Calls that compute the unit on x (N, C, H, W), by name; take the fastest.

    With a residual there are two: inductor adds to it in place where nothing else needs it. The
    weights are `copies` equal ones in turn.
    """
    scale, shift = fold(unit)
    weight = (unit.conv.weight.double() * scale.double()[:, None, None, None]).to(dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    keywords = conv_keywords(unit)
    geometry = [list(keywords[name]) for name in ("padding", "stride", "dilation")]
    geometry.append(keywords["groups"])
    weights = [
        _ops._reorder_convolution_weight(weight, *geometry, list(x.shape)) for _ in range(copies)
    ]
    bias, relu = shift.to(dtype), keywords["act"] == "relu"
    if residual is None:
        tail = ("relu" if relu else "none", [], "")
        run = _ops._convolution_pointwise
        return {"oneDNN": in_turn([lambda w=w: run(x, w, bias, *geometry, *tail) for w in weights])}
    tail = ("add", 1.0, "relu" if relu else None, [], None)
    run, run_in_place = _ops._convolution_pointwise.binary, _ops._convolution_pointwise_.binary
    own = residual.clone()  # grows at every call
    return {
        "oneDNN": in_turn(
            [lambda w=w: run(x, residual, w, bias, *geometry, *tail) for w in weights]
        ),
        "oneDNN in place": in_turn(
            [lambda w=w: run_in_place(own, x, w, bias, *geometry, *tail) for w in weights]
        ),
    }


def in_turn(calls: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """A call that runs one of these after the other."""
    if len(calls) == 1:
        return calls[0]
    turn = -1

    def call() -> Tensor:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call
