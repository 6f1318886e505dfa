"""Autocast: x, weight and residual are cast, scale and shift stay float32.

With kernels of our own, because torch.library.register_autocast casts every argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import check
from .._schemas import library

_ops = torch.ops.resnet_fused


def is_autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for a device; devices that cannot have it, such as meta, included."""
    return _can_have_autocast(device.type) and torch.is_autocast_enabled(device.type)


def _can_have_autocast(device_type: str) -> bool:
    # Most calls end here, and so do all that Dynamo traces: that of torch 2.11 cannot trace the
    # question below.
    return device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)


def to_autocast_dtype(tensor: Any) -> Any:
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
            to_autocast_dtype(a) if name in casts else a
            for name, a in zip(arguments, args, strict=False)
        ]
        with torch._C._ExcludeDispatchKeyGuard(excluded):  # also for the convolution inside
            return op(*cast, **kwargs)

    library.impl(name, kernel, key)


for _key in ("AutocastCPU", "AutocastCUDA"):
    _register_autocast("conv_bn_act", ("x", "weight", "residual"), _key)
    _register_autocast("conv_bn_act_packed", (), _key)
    _register_autocast("conv_bn_act_kept", (), _key)
    _register_autocast("residual_block", (), _key)
    _register_autocast("conv_bn_act_triton", (), _key)
    _register_autocast("conv_bn_act_cuda", (), _key)
    _register_autocast("conv_bn_act_pool_cuda", (), _key)
    _register_autocast("bottleneck_tail_cuda", (), _key)
