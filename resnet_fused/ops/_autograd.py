"""Backward of the differentiable ops, and the refusal of gradients by the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._schemas import NAMESPACE, library

_ops = torch.ops.resnet_fused


def conv_bn_act_vjp(
    grad: Tensor,
    y: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    act: str,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of conv_bn_act for x, weight, scale, shift and residual, None where not needed.

    y is the op's output, needed for "relu" only. Written in differentiable ops, so that it can be
    differentiated again.
    """
    wide = scale.dtype
    if act == "relu":
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    grad_scale = grad_shift = None
    if needs[2]:
        # Recomputed rather than saved: a training step uses the eager block, this path is rare.
        conv = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups)
        grad_scale = _channel_sum(grad.to(wide) * conv.to(wide))
    if needs[3]:
        grad_shift = _channel_sum(grad.to(wide))
    grad_x = grad_weight = None
    if needs[0] or needs[1]:
        grad_conv = (grad.to(wide) * scale[:, None, None]).to(x.dtype)
        batched = x.dim() == 4
        if needs[1] and _overruns(x, weight):
            grad_conv, x, weight = map(_row_major, (grad_conv, x, weight))
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_conv if batched else grad_conv.unsqueeze(0),
            x if batched else x.unsqueeze(0),
            weight,
            None,
            list(stride),
            list(padding),
            list(dilation),
            False,
            [0, 0],
            groups,
            [needs[0], needs[1], False],
        )
        if needs[0] and not batched:
            grad_x = grad_x.squeeze(0)
    return grad_x, grad_weight, grad_scale, grad_shift, grad if needs[4] else None


def _overruns(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may write beyond the weight's gradient in channels_last.

    Its AVX2 kernel of torch 2.13 does for 1x1 kernels of stride 2 and fewer than 8 input channels;
    nobody needs to know whether other strides are safe.
    """
    return x.is_cpu and weight.shape[1] < 8 and weight.shape[2:].numel() == 1


def _row_major(tensor: Tensor) -> Tensor:
    """With the strides of its shape: contiguous() leaves those of a side of 1 as they are."""
    return tensor.flatten().view(tensor.shape)


def _channel_sum(values: Tensor) -> Tensor:
    return values.sum([d for d in range(values.dim()) if d != values.dim() - 3])


_CONV_DEFAULTS = {
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "act": "relu",
}


def _conv_bn_act_context(ctx, inputs, keyword_only_inputs, output):
    x, weight, scale, _, residual = inputs
    ctx.keywords = {**_CONV_DEFAULTS, **keyword_only_inputs}
    # Without activation the output is not needed, and whoever gets it may write to it.
    ctx.save_for_backward(x, weight, scale, output if ctx.keywords["act"] == "relu" else None)
    ctx.has_residual = residual is not None


def _conv_bn_act_backward(ctx, grad):
    x, weight, scale, y = ctx.saved_tensors
    needs = (*ctx.needs_input_grad[:4], ctx.has_residual and ctx.needs_input_grad[4])
    return conv_bn_act_vjp(grad, y, x, weight, scale, needs=needs, **ctx.keywords)


torch.library.register_autograd(
    f"{NAMESPACE}::conv_bn_act",
    _conv_bn_act_backward,
    setup_context=_conv_bn_act_context,
    lib=library,
)


def _add_relu_context(ctx, inputs, output):
    ctx.save_for_backward(output)


def _add_relu_backward(ctx, grad):
    (y,) = ctx.saved_tensors
    grad = torch.ops.aten.threshold_backward(grad, y, 0)
    return grad, grad


torch.library.register_autograd(
    f"{NAMESPACE}::add_relu", _add_relu_backward, setup_context=_add_relu_context, lib=library
)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among an op's positional arguments and in their lists."""
    for arg in args:
        for value in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(value, Tensor):
                yield value


def _forward_only(name: str) -> None:
    """Refuses inputs that need gradients instead of losing the gradients silently."""
    op = getattr(_ops, name).default

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args)):
            raise RuntimeError(
                f"{name}: is forward only: call it under torch.no_grad(), "
                "or conv_bn_act for gradients"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    library.impl(name, kernel, "Autograd")


_forward_only("pack_conv")
_forward_only("conv_bn_act_packed")
_forward_only("conv_bn_act_kept")
_forward_only("conv_bn_act_triton")
_forward_only("conv_bn_act_cuda")
_forward_only("conv_bn_act_pool_cuda")
_forward_only("bottleneck_tail_cuda")
_forward_only("add_relu_triton")
_forward_only("add_relu_cuda")
_forward_only("scale_shift_act_cuda")
_forward_only("residual_block")
_forward_only("run_prepared")
_forward_only("run_prepared_cuda")
_forward_only("global_avg_pool")
_forward_only("linear")
