"""How a fused module runs its units one by one: packed or in a graph, with gradients or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import packing, reference
from ._capture import folds_constants
from .conv_shape import Choice
from .ops import conv_bn_act_vjp
from .recipe import ConvUnit

_ops = torch.ops.resnet_fused

Run = Callable[[int, Tensor, Tensor | None], Tensor]
"""run(i, x, residual): unit i of the module."""


class _ConvBnAct(torch.autograd.Function):
    """conv_bn_act on packed weights, for eval() with gradients: packs once, not at every call.

    Without the max-pool, which is PyTorch's own there: its backward needs what it pooled.
    """

    @staticmethod
    def forward(ctx, unit, x, weight, scale, shift, residual):
        keywords = unit.keywords | {"pool": False}
        y = _ops.conv_bn_act_packed(x, unit.weight, scale, shift, residual, **keywords)
        ctx.keywords = {name: keywords[name] for name in packing.CONV_KEYWORDS}
        ctx.save_for_backward(x, weight, scale, y if keywords["act"] == "relu" else None)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale, y = ctx.saved_tensors
        grads = conv_bn_act_vjp(
            grad, y, x, weight, scale, needs=ctx.needs_input_grad[1:], **ctx.keywords
        )
        return (None, *grads)


def packed(units: Sequence[packing.PackedUnit]) -> Run:
    def run(i: int, x: Tensor, residual: Tensor | None) -> Tensor:
        # Below autograd: nothing needs gradients here, and asking again costs 6 us a call.
        with torch._C._AutoDispatchBelowAutograd():
            return units[i](x, residual)

    return run


def in_graph(units: Sequence[ConvUnit], dtype: torch.dtype, choices: Sequence[Choice]) -> Run:
    """Packs inside the graph where that is folded into a constant."""
    folded = folds_constants()

    def run(i: int, x: Tensor, residual: Tensor | None) -> Tensor:
        # no_grad would not do: strict export replays the graph without it.
        x, residual = x.detach(), residual if residual is None else residual.detach()
        if folded:
            return packing.pack(units[i], dtype, choices[i])(x, residual)
        return packing.run_unpacked(units[i], dtype, choices[i], x, residual)

    return run


def differentiable(
    units: Sequence[ConvUnit], dtype: torch.dtype, forward: Sequence[packing.PackedUnit]
) -> Run:
    def run(i: int, x: Tensor, residual: Tensor | None) -> Tensor:
        scale, shift = packing.fold(units[i])
        weight = units[i].conv.weight.to(dtype)
        y = _ConvBnAct.apply(forward[i], x, weight, scale, shift, residual)
        return reference.max_pool(y) if units[i].max_pool else y

    return run


def differentiable_in_graph(units: Sequence[ConvUnit], dtype: torch.dtype) -> Run:
    def run(i: int, x: Tensor, residual: Tensor | None) -> Tensor:
        scale, shift = packing.fold(units[i])
        weight = units[i].conv.weight.to(dtype)
        y = _ops.conv_bn_act(x, weight, scale, shift, residual, **packing.conv_keywords(units[i]))
        return reference.max_pool(y) if units[i].max_pool else y

    return run
