"""The ops: schemas, argument checks, fakes, autograd, autocast, and a fallback in plain PyTorch.

    conv_bn_act         act(conv2d(x, weight) * scale + shift + residual); chooses who computes it
    add_relu            relu(a + b)
    pack_conv           weights in the layout of a plan
    conv_bn_act_packed  conv_bn_act on packed weights, forward only: what the fused modules run
    content_*           has a tensor been edited? for the cache of packed weights

All of them exist whether or not the C++ extension does: with it, its kernels take the CPU; without it,
and on every other device, the definitions of `reference` run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import check, reference

_NAMESPACE = "resnet_fused"
_lib = torch.library.Library(_NAMESPACE, "DEF")

_CONV_KEYWORDS = (
    'int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, str act="relu"'
)
_SCHEMAS = (
    f"conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual=None, *, "
    f"{_CONV_KEYWORDS}) -> Tensor",
    "add_relu(Tensor a, Tensor b) -> Tensor",
    "pack_conv(Tensor weight, int groups=1, *, str plan) -> Tensor",
    f"conv_bn_act_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift, Tensor? residual=None, *, "
    f"int[2] kernel_size, {_CONV_KEYWORDS}, str plan) -> Tensor",
    "content_sample(Tensor[] tensors) -> Tensor",
    "content_equal(Tensor[] tensors, Tensor sample) -> bool",
    "content_hash(Tensor[] tensors) -> int",
    "cpu_isa() -> str",
    "set_cpu_isa(str isa) -> ()",
    "cpu_features() -> str",
)
for _schema in _SCHEMAS:
    _lib.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_ops = torch.ops.resnet_fused


def _load_extension() -> str | None:
    """Registers the C++ kernels; returns why it could not, or None."""
    if os.environ.get("RESNET_FUSED_DISABLE_EXT", "0") not in ("", "0"):
        return "RESNET_FUSED_DISABLE_EXT is set"
    try:
        found = importlib.util.find_spec("resnet_fused._C")
    except ImportError as error:
        return str(error)
    if found is None or found.origin is None:
        return "resnet_fused._C was not built (resnet-fused doctor says why)"
    try:
        torch.ops.load_library(found.origin)  # loaded, not imported: it needs nothing of Python
    except OSError as error:
        return str(error)
    return None


extension_error: str | None = _load_extension()
"""None where the C++ kernels are loaded, else why they are not."""


# ---- public functions ------------------------------------------------------------------------------


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    act: str = "relu",
) -> Tensor:
    """act(conv2d(x, weight) * scale + shift + residual) in one pass.

    x: (N, C, H, W) or (C, H, W), float32, bfloat16, float16 or float64, any strides.
    weight: (K, C / groups, R, S), like residual of x's dtype and on x's device.
    scale, shift: (K,), float32; float64 where x is float64.
    residual: None, or the output's shape.
    act: "relu" (NaN passes) or "none".
    Returns (N, K, H', W') or (K, H', W') in x's dtype, dense channels_last. Sums are kept in float32
    at least. Differentiable in all five tensors; under autocast x, weight and residual are cast.
    Raises ValueError or TypeError with one sentence that names the argument.
    """
    if isinstance(x, Tensor) and is_autocast_on(x.device):
        x, weight, residual = (_autocast(t) for t in (x, weight, residual))
    check.conv_bn_act(
        "conv_bn_act", x, weight, scale, shift, residual, stride, padding, dilation, groups, act
    )
    return _ops.conv_bn_act(
        x,
        weight,
        scale,
        shift,
        residual,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
    )


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b), NaN passes; a and b: same shape, dtype and device. Keeps a's memory format.

    Raises ValueError or TypeError with one sentence that names the argument.
    """
    check.add_relu("add_relu", a, b)
    return _ops.add_relu(a, b)


def pack_conv(weight: Tensor, groups: int = 1, *, plan: str) -> Tensor:
    """The weights (K, C / groups, R, S) in the layout of `plan`, for conv_bn_act_packed. Forward only."""
    _check_pack(weight, groups, plan)
    return _ops.pack_conv(weight, groups, plan=plan)


def cpu_isa() -> str:
    """The instruction set whose kernels run on the CPU, "none" without the extension."""
    return _ops.cpu_isa() if extension_error is None else "none"


CPU_FEATURES = frozenset(_ops.cpu_features().split() if extension_error is None else ())
"""What CPUID reports of the features that the choice of kernels looks at; empty without the extension."""


# ---- shapes and layouts of results -----------------------------------------------------------------

_PANEL = 32  # output channels of a panel, csrc/cpu/direct.h
_WINOGRAD_POINTS = {"winograd4": 36, "winograd2": 16}


def _empty_nhwc(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty (..., C, H, W) tensor that lies in memory as (..., H, W, C)."""
    *batch, channels, height, width = shape
    return like.new_empty((*batch, height, width, channels)).movedim(-1, -3)


def _empty_like(tensor: Tensor) -> Tensor:
    """An empty tensor in this one's format; contiguous where there is no element.

    For those torch.empty_like does one thing to real tensors and another to fake ones.
    """
    numel = tensor.numel()
    empty = isinstance(numel, int) and numel == 0
    return tensor.new_empty(tensor.shape) if empty else torch.empty_like(tensor)


def _packed_shape(weight_shape: tuple[int, ...], groups: int, plan: str) -> tuple[int, ...]:
    """The shape of pack_conv's result, csrc/cpu/plan.h."""
    out_channels, group_in, kernel_h, kernel_w = weight_shape
    if plan == "torch":
        return weight_shape
    panels = -(-(out_channels // groups) // _PANEL)
    if plan in _WINOGRAD_POINTS:
        return (panels, _WINOGRAD_POINTS[plan], group_in, _PANEL)
    return (groups * panels, kernel_h * kernel_w * group_in, _PANEL)


def _check_pack(weight: Any, groups: Any, plan: Any) -> None:
    op = "pack_conv"
    check.conv_weight(op, weight)
    check.group_count(op, groups, None, weight.shape[0])
    check.one_of(op, "plan", plan, check.PLANS)
    check.plan_weight(op, plan, weight.dtype, weight.shape[2:], groups)


def _check_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    act: str,
    plan: str,
) -> tuple[int, ...]:
    op = "conv_bn_act_packed"
    check.image(op, "x", x)
    check.channel_vector(op, "scale", scale)
    kernel = check.pair(op, "kernel_size", kernel_size, 1)
    check.group_count(op, groups, x.shape[-3], scale.shape[0])
    check.one_of(op, "plan", plan, check.PLANS)
    check.plan_weight(op, plan, x.dtype, kernel, groups, stride, dilation)
    weight_shape = (scale.shape[0], x.shape[-3] // groups, *kernel)
    check.shape(op, "packed", packed, _packed_shape(weight_shape, groups, plan))
    check.like(op, "packed", packed, x, x.dtype if plan == "torch" else torch.float32)
    return check.conv_args(
        op, x, weight_shape, scale, shift, residual, stride, padding, dilation, groups, act
    )


# ---- fakes: shapes and strides without data ----------------------------------------------------------
# Python kernels see only the arguments that differ from the schema's defaults, so they repeat them.


@torch.library.register_fake(f"{_NAMESPACE}::conv_bn_act", lib=_lib)
def _conv_bn_act_fake(
    x,
    weight,
    scale,
    shift,
    residual=None,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    act="relu",
):
    shape = check.conv_bn_act(
        "conv_bn_act", x, weight, scale, shift, residual, stride, padding, dilation, groups, act
    )
    return _empty_nhwc(x, shape)


@torch.library.register_fake(f"{_NAMESPACE}::add_relu", lib=_lib)
def _add_relu_fake(a, b):
    check.add_relu("add_relu", a, b)
    return _empty_like(a)


@torch.library.register_fake(f"{_NAMESPACE}::pack_conv", lib=_lib)
def _pack_conv_fake(weight, groups=1, *, plan):
    _check_pack(weight, groups, plan)
    if plan == "torch":
        return _empty_nhwc(weight, tuple(weight.shape))
    return weight.new_empty(_packed_shape(tuple(weight.shape), groups, plan), dtype=torch.float32)


@torch.library.register_fake(f"{_NAMESPACE}::conv_bn_act_packed", lib=_lib)
def _conv_bn_act_packed_fake(
    x,
    packed,
    scale,
    shift,
    residual=None,
    *,
    kernel_size,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    act="relu",
    plan,
):
    shape = _check_packed(
        x, packed, scale, shift, residual, kernel_size, stride, padding, dilation, groups, act, plan
    )
    return _empty_nhwc(x, shape)


# ---- the fallback, in PyTorch's own ops --------------------------------------------------------------


def _impl(name: str, key: str = "CompositeExplicitAutograd", **options: bool) -> Callable:
    def register(function: Callable) -> Callable:
        _lib.impl(name, function, key, **options)
        return function

    return register


def _as_runtime_error(checker: Callable, *args: Any) -> Any:
    """Direct torch.ops calls raise RuntimeError everywhere, as C++ kernels must."""
    try:
        return checker(*args)
    except (ValueError, TypeError) as error:
        raise RuntimeError(str(error)) from None


def _dense_nhwc(y: Tensor) -> Tensor:
    out = _empty_nhwc(y, tuple(y.shape))
    return y if y.stride() == out.stride() else out.copy_(y)


@_impl("conv_bn_act")
def _conv_bn_act(
    x,
    weight,
    scale,
    shift,
    residual=None,
    *,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    act="relu",
):
    """Chooses, packs, runs. Modules do the first two once and keep the result."""
    from . import select  # select asks this module what is available

    result = _as_runtime_error(
        check.conv_bn_act,
        *("conv_bn_act", x, weight, scale, shift, residual, stride, padding, dilation, groups, act),
    )
    kernel = (weight.shape[2], weight.shape[3])
    shape = select.ConvShape(
        device=x.device.type,
        dtype=x.dtype,
        in_channels=x.shape[-3],
        out_channels=weight.shape[0],
        kernel=kernel,
        out_size=result[-2:],
        stride=tuple(stride),
        dilation=tuple(dilation),
        groups=groups,
    )
    plan = select.choose(shape, packed_once=False).plan
    return _ops.conv_bn_act_packed(
        x,
        _ops.pack_conv(weight, groups, plan=plan),
        scale,
        shift,
        residual,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
        plan=plan,
    )


@_impl("pack_conv")
def _pack_conv(weight, groups=1, *, plan):
    _as_runtime_error(_check_pack, weight, groups, plan)
    _refuse_ours("pack_conv", plan, weight)
    return _empty_nhwc(weight, tuple(weight.shape)).copy_(weight)


@_impl("conv_bn_act_packed")
def _conv_bn_act_packed(
    x,
    packed,
    scale,
    shift,
    residual=None,
    *,
    kernel_size,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    act="relu",
    plan,
):
    _as_runtime_error(
        _check_packed,
        *(
            x,
            packed,
            scale,
            shift,
            residual,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            act,
            plan,
        ),
    )
    _refuse_ours("conv_bn_act_packed", plan, x)
    y = reference.conv_bn_act(
        x,
        packed,
        scale,
        shift,
        residual,
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        act=act,
    )
    return _dense_nhwc(y)


def _refuse_ours(op: str, plan: str, where: Tensor) -> None:
    if plan in check.PLANS and plan != "torch":
        reason = extension_error or f"there is none for {where.device.type}"
        raise RuntimeError(f'{op}: plan "{plan}" needs our compiled CPU kernel: {reason}')


@_impl("add_relu")
def _add_relu(a, b):
    _as_runtime_error(check.add_relu, "add_relu", a, b)
    return _empty_like(a).copy_(reference.add_relu(a, b))


_SAMPLES = 64  # values looked at in a tensor of more than one dimension, csrc/cpu/content.h


@_impl("content_sample")
def _content_sample(tensors):
    samples = []
    for tensor in tensors:
        values = tensor.detach().flatten()
        if tensor.dim() > 1 and values.numel() > _SAMPLES:
            steps = torch.arange(_SAMPLES, device=values.device)
            step = values.numel() // _SAMPLES
            values = values[steps * step + (steps * 5) % step]
        samples.append(values.contiguous().view(torch.uint8))
    return torch.cat(samples)


@_impl("content_equal")
def _content_equal(tensors, sample):
    return torch.equal(_content_sample(tensors), sample)


@_impl("content_hash")
def _content_hash(tensors):
    total = 0
    for tensor in tensors:
        words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        values = tensor.detach().flatten().view(words).long()
        place = torch.arange(1, values.numel() + 1, device=values.device)
        mixed = (values + place * 0x9E3779B1) * (place * 2 + 1)
        total = (total * 31 + int((mixed ^ (mixed >> 29)).sum())) % (1 << 63)
    return total


# ---- autograd ----------------------------------------------------------------------------------------


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
    f"{_NAMESPACE}::conv_bn_act",
    _conv_bn_act_backward,
    setup_context=_conv_bn_act_context,
    lib=_lib,
)


def _add_relu_context(ctx, inputs, output):
    ctx.save_for_backward(output)


def _add_relu_backward(ctx, grad):
    (y,) = ctx.saved_tensors
    grad = torch.ops.aten.threshold_backward(grad, y, 0)
    return grad, grad


torch.library.register_autograd(
    f"{_NAMESPACE}::add_relu", _add_relu_backward, setup_context=_add_relu_context, lib=_lib
)


def _forward_only(name: str) -> None:
    """Refuses inputs that need gradients instead of losing the gradients silently."""
    op = getattr(_ops, name).default

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"{name}: is forward only: call it under torch.no_grad(), or conv_bn_act for gradients"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    _lib.impl(name, kernel, "Autograd")


_forward_only("pack_conv")
_forward_only("conv_bn_act_packed")


# ---- autocast ----------------------------------------------------------------------------------------


def is_autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for a device; devices that cannot have it, such as meta, included."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _autocast(tensor: Any) -> Any:
    """The tensor in autocast's dtype, by autocast's own rule: float64 and integers stay."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in check.FLOAT_DTYPES[:3]:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _register_autocast(name: str, casts: tuple[str, ...], key: str) -> None:
    op = getattr(_ops, name).default
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    arguments = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        cast = [
            _autocast(a) if name in casts else a for name, a in zip(arguments, args, strict=False)
        ]
        with torch._C._ExcludeDispatchKeyGuard(excluded):  # also for the convolution inside
            return op(*cast, **kwargs)

    _lib.impl(name, kernel, key)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _register_autocast("conv_bn_act", ("x", "weight", "residual"), _key)
    _register_autocast("conv_bn_act_packed", (), _key)
