"""The ops.

    conv_bn_act         act(conv2d(x, weight) * scale + shift + residual); chooses who computes it
    add_relu            relu(a + b)
    pack_conv           weights in the layout of a plan
    conv_bn_act_packed  conv_bn_act on packed weights, forward only: what the fused modules run
    conv_bn_act_kept    the same on plain weights, packed ones kept by content: for graphs
    residual_block      a whole block on packed weights, forward only
    prepare, run_prepared  either of the two with its arguments checked once; *_cuda: on a GPU
    prepare_chain       several of those, with what follows the last block, as one
    global_avg_pool, linear  what follows the last block, for a few images
    content_*           has a tensor been edited? for the cache of packed weights

All of them exist whether or not anything is compiled. With the C++ extension its kernels take the
CPU. Everywhere else _composite chooses: on a GPU the kernels in CUDA C++ or Triton that serve, and
where there is none PyTorch's operations. Importing this package registers what belongs to
the schemas (resnet_fused._schemas): fakes, the ops in Python, autograd, autocast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import check, reference
from .._extension import CPU_FEATURES, cpu_isa, extension_error
from . import _composite, _fakes  # noqa: F401 - they register the ops
from ._autocast import is_autocast_on, to_autocast_dtype
from ._autograd import conv_bn_act_vjp
from ._shapes import check_pack
from ._transforms import is_transformed

__all__ = [
    "CPU_FEATURES",
    "add_relu",
    "conv_bn_act",
    "conv_bn_act_vjp",
    "cpu_isa",
    "extension_error",
    "is_autocast_on",
    "pack_conv",
]

_ops = torch.ops.resnet_fused


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
    Returns (N, K, H', W') or (K, H', W') in x's dtype, dense channels_last. Sums are kept in
    float32 at least. Differentiable in all five tensors, forwards and within torch.func by
    PyTorch's own operations; under autocast x, weight and residual are cast.
    Raises ValueError or TypeError with one sentence that names the argument.
    """
    if isinstance(x, Tensor) and is_autocast_on(x.device):
        x, weight, residual = (to_autocast_dtype(t) for t in (x, weight, residual))
    check.conv_bn_act(
        "conv_bn_act", x, weight, scale, shift, residual, stride, padding, dilation, groups, act
    )
    compute = reference.conv_bn_act if _is_transformed() else _ops.conv_bn_act
    return compute(
        x,
        weight,
        scale,
        shift,
        residual,
        stride=check.pair("conv_bn_act", "stride", stride, 1),
        padding=check.pair("conv_bn_act", "padding", padding, 0),
        dilation=check.pair("conv_bn_act", "dilation", dilation, 1),
        groups=groups,
        act=act,
    )


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b), NaN passes; a and b: same shape, dtype and device. Keeps a's memory format.

    Raises ValueError or TypeError with one sentence that names the argument.
    """
    check.add_relu("add_relu", a, b)
    return (reference.add_relu if _is_transformed() else _ops.add_relu)(a, b)


def _is_transformed() -> bool:
    return not torch.compiler.is_compiling() and is_transformed()


def pack_conv(weight: Tensor, groups: int = 1, *, plan: str) -> Tensor:
    """The weights (K, C / groups, R, S) in the layout of `plan`. Forward only.

    plan: one of check.PLANS that the weights' device has. Raises ValueError or TypeError.
    """
    check_pack(weight, groups, plan)
    return _ops.pack_conv(weight, groups, plan=plan)
