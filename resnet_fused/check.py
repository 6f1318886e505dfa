"""Argument checks of the public functions, the fakes and the modules: one sentence each.

Every message names the argument, what was expected and what came. Wrong types and dtypes raise
TypeError, everything else ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ._environment import INTERPRETED

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("relu", "none")
LARGEST = 2**31 - 1  # of a stride, padding, dilation or kernel: kernels compute in 64 bits


@dataclass(frozen=True)
class PlanTraits:
    """What a plan demands of a convolution, and what it does to exactness."""

    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES[:3]
    device: str = "cpu"  # the only type of device; "": any
    kernel: int | None = None  # side of the only kernel, in one group, undilated; None: any kernel
    stride: int = 1  # the only one, where `kernel` is set
    any_columns: bool = False  # `kernel` and `stride` are those of the rows, the columns' are free
    isa: str = ""  # the only instruction set, csrc/cpu/isa.cpp; "": any
    spreads: bool = False  # NaN, Inf and near overflow reach the neighbours: no exact_nonfinite
    opt_in: bool = False  # error above a convolution's bound: only for those who ask for it


_BF16 = (torch.bfloat16,)

# One row a plan: the argument checks, the candidates of a convolution and every list of plans
# follow from it. The same demands of the CPU's in C++: csrc/cpu/plan.h.
PLAN_TRAITS = {
    "direct": PlanTraits(),
    "winograd4": PlanTraits(kernel=3, spreads=True),
    "winograd4_raw": PlanTraits(kernel=3, spreads=True),
    "winograd2": PlanTraits(kernel=3, spreads=True),
    "winograd5": PlanTraits(kernel=3, spreads=True, opt_in=True),
    "winograd4s2": PlanTraits(kernel=3, stride=2, spreads=True),
    "winograd2s2": PlanTraits(kernel=3, stride=2, spreads=True),
    "direct_bf16": PlanTraits(dtypes=_BF16, isa="avx512bf16"),
    "winograd2_bf16": PlanTraits(dtypes=_BF16, kernel=3, spreads=True, isa="avx512bf16"),
    "winograd2s2_bf16": PlanTraits(
        dtypes=_BF16, kernel=3, stride=2, spreads=True, isa="avx512bf16"
    ),
    "stem": PlanTraits(kernel=7, stride=2, any_columns=True, spreads=True),
    "triton": PlanTraits(device="cuda"),
    "cuda": PlanTraits(device="cuda"),
    "torch": PlanTraits(dtypes=FLOAT_DTYPES, device=""),
}
PLANS = tuple(PLAN_TRAITS)
CPU_PLANS, CUDA_PLANS = (
    tuple(plan for plan, traits in PLAN_TRAITS.items() if traits.device in ("", device))
    for device in ("cpu", "cuda")
)
PLAIN_LAYOUT = CUDA_PLANS  # packed weights are the plain ones, in memory (K, R, S, C / groups)


def plans_of(device: str) -> tuple[str, ...]:
    """The plans that a type of device may have, "meta" any; `select` knows which are there."""
    if device == "cpu" and INTERPRETED:  # Triton's interpreter runs its kernels on the CPU
        return (*CPU_PLANS, "triton")
    return {"cpu": CPU_PLANS, "cuda": CUDA_PLANS}.get(device, PLANS)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _wrong_type(op: str, name: str, expected: str, value: Any) -> NoReturn:
    raise TypeError(f"{op}: {name} must be {expected}, got {type(value).__name__}")


def module(op: str, name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        kind = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a torch.nn.Module, got {kind}")


def tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        _wrong_type(op, name, "a torch.Tensor", value)


def float_tensor(op: str, name: str, value: Any) -> None:
    tensor(op, name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, bfloat16, float16 or float64, "
            f"got {dtype_name(value.dtype)}"
        )
    _strided(op, name, value)


def _strided(op: str, name: str, value: Tensor) -> None:
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a strided tensor, got layout {value.layout}")
    if value.is_nested:
        raise TypeError(f"{op}: {name} must be a strided tensor, got a nested one")


def like(op: str, name: str, value: Any, x: Tensor, dtype: torch.dtype, x_name: str = "x") -> None:
    """A tensor of the given dtype on the device of x."""
    tensor(op, name, value)
    _strided(op, name, value)
    if value.dtype != dtype:
        raise TypeError(f"{op}: {name} must be {dtype_name(dtype)}, got {dtype_name(value.dtype)}")
    if value.device != x.device:
        raise ValueError(
            f"{op}: {name} must be on {x.device}, where {x_name} is, got {value.device}"
        )


def shape(op: str, name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if shape_of(value) != expected:
        raise ValueError(f"{op}: {name} must have shape {expected}, got {shape_of(value)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def pair(op: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """An int or a pair of ints, each at least `least` and at most LARGEST, as a pair."""
    both = (value, value) if _is_int(value) else value
    if not isinstance(both, Sequence) or isinstance(both, str):
        _wrong_type(op, name, "an int or a pair of ints", value)
    if not all(map(_is_int, both)):
        raise TypeError(f"{op}: {name} must be an int or a pair of ints, got {value!r}")
    if len(both) == 1:  # the dispatcher's own way of writing one value for both
        both = (both[0], both[0])
    if len(both) != 2:
        raise ValueError(f"{op}: {name} must be an int or a pair of ints, got {tuple(both)}")
    if min(both) < least:
        got = value if _is_int(value) else tuple(value)
        raise ValueError(f"{op}: {name} must be at least {least}, got {got}")
    if max(both) > LARGEST:
        got = value if _is_int(value) else tuple(value)
        raise ValueError(f"{op}: {name} must be at most {LARGEST}, got {got}")
    return (both[0], both[1])


def group_count(op: str, groups: Any, in_channels: int | None, out_channels: int) -> None:
    """in_channels: None where only the weight is known, which has in_channels / groups."""
    if not _is_int(groups):
        _wrong_type(op, "groups", "an int", groups)
    if groups < 1:
        raise ValueError(f"{op}: groups must be at least 1, got {groups}")
    if in_channels is None:
        if out_channels % groups:
            raise ValueError(
                f"{op}: groups must divide the {out_channels} output channels of weight, "
                f"got {groups}"
            )
    elif in_channels % groups or out_channels % groups:
        raise ValueError(
            f"{op}: groups must divide the {in_channels} input and {out_channels} output channels, "
            f"got {groups}"
        )


def one_of(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        choices = " or ".join(f'"{choice}"' for choice in allowed)
        got = f'"{value}"' if isinstance(value, str) else repr(value)
        raise ValueError(f"{op}: {name} must be {choices}, got {got}")


def plan_weight(
    op: str,
    plan: str,
    dtype: torch.dtype,
    kernel: tuple[int, int],
    groups: int,
    stride: Any = None,
    dilation: Any = (1, 1),
) -> None:
    """What a plan demands of the convolution."""
    traits = PLAN_TRAITS[plan]
    if dtype not in traits.dtypes:
        *most, last = map(dtype_name, traits.dtypes)
        names = f"{', '.join(most)} or {last}" if most else last
        raise TypeError(f'{op}: plan "{plan}" takes {names}, got {dtype_name(dtype)}')
    if traits.kernel is None:
        return
    side, step = traits.kernel, traits.stride
    expected = f"kernels of {side} rows" if traits.any_columns else f"{side} x {side} kernels"
    if not _is_side(kernel, side, traits) or groups != 1:
        raise ValueError(
            f'{op}: plan "{plan}" takes {expected} in one group, '
            f"got {kernel[0]} x {kernel[1]} in {groups}"
        )
    if stride is None:
        return  # packing, which does not know
    stride, dilation = pair(op, "stride", stride, 1), pair(op, "dilation", dilation, 1)
    if not _is_side(stride, step, traits) or dilation != (1, 1):
        where = " along the rows" if traits.any_columns else ""
        raise ValueError(
            f'{op}: plan "{plan}" takes stride {step}{where} and dilation 1, '
            f"got stride {stride} and dilation {dilation}"
        )


def _is_side(pair: Sequence[int], number: int, traits: PlanTraits) -> bool:
    return pair[0] == number and (traits.any_columns or pair[1] == number)


def fits_plan(
    plan: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> bool:
    """Whether a plan's kernel computes convolutions of this geometry."""
    traits = PLAN_TRAITS[plan]
    if traits.kernel is None:
        return True
    sides = _is_side(kernel, traits.kernel, traits) and _is_side(stride, traits.stride, traits)
    return sides and (dilation, groups) == ((1, 1), 1)


def image(op: str, name: str, x: Any) -> None:
    """A float tensor (C, H, W) or (N, C, H, W)."""
    float_tensor(op, name, x)
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{op}: {name} must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape {shape_of(x)}"
        )


def output_size(
    op: str,
    size: Sequence[int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Rows and columns of the convolution's output for an input of `size`."""
    padded = [length + 2 * pad for length, pad in zip(size, padding, strict=True)]
    reach = [step * (length - 1) + 1 for length, step in zip(kernel, dilation, strict=True)]
    if padded[0] < reach[0] or padded[1] < reach[1]:
        raise ValueError(
            f"{op}: x must be at least as large as the kernel: the padded input is "
            f"{padded[0]} x {padded[1]}, the kernel spans {reach[0]} x {reach[1]}"
        )
    return ((padded[0] - reach[0]) // stride[0] + 1, (padded[1] - reach[1]) // stride[1] + 1)


def pooled_size(size: int) -> int:
    """Rows or columns behind the 3x3 max-pool of stride 2 and padding 1."""
    return (size - 1) // 2 + 1


def _scale_and_shift(op: str, scale: Any, shift: Any, x: Tensor, out_channels: int) -> None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, value in (("scale", scale), ("shift", shift)):
        like(op, name, value, x, dtype)
        shape(op, name, value, (out_channels,))


def channel_vector(op: str, name: str, value: Any) -> None:
    """Where the number of output channels is read from: scale of conv_bn_act_packed."""
    tensor(op, name, value)
    if value.dim() != 1 or value.numel() == 0:
        raise ValueError(
            f"{op}: {name} must be 1-D, one value per output channel, got shape {shape_of(value)}"
        )


def conv_args(
    op: str,
    x: Any,
    weight_shape: tuple[int, int, int, int],
    scale: Any,
    shift: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    act: Any,
) -> tuple[int, ...]:
    """Checks all of a fused convolution but the weight itself; returns the output's shape."""
    image(op, "x", x)
    out_channels, group_in, *kernel = weight_shape
    group_count(op, groups, x.shape[-3], out_channels)
    if x.shape[-3] != group_in * groups:
        raise ValueError(f"{op}: x must have {group_in * groups} channels, got shape {shape_of(x)}")
    stride = pair(op, "stride", stride, 1)
    padding = pair(op, "padding", padding, 0)
    dilation = pair(op, "dilation", dilation, 1)
    one_of(op, "act", act, ACTIVATIONS)
    _scale_and_shift(op, scale, shift, x, out_channels)
    height, width = output_size(op, x.shape[-2:], (kernel[0], kernel[1]), stride, padding, dilation)
    result = (*x.shape[:-3], out_channels, height, width)
    if residual is not None:
        like(op, "residual", residual, x, x.dtype)
        shape(op, "residual", residual, result)
    return result


def conv_weight(op: str, weight: Any) -> None:
    float_tensor(op, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(
            f"{op}: weight must be 4-D (out_channels, in_channels / groups, kernel_h, kernel_w), "
            f"got shape {shape_of(weight)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{op}: weight must not be empty, got shape {shape_of(weight)}")


def conv_bn_act(
    op: str,
    x: Any,
    weight: Any,
    scale: Any,
    shift: Any,
    residual: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    act: Any,
) -> tuple[int, ...]:
    """Checks every argument of conv_bn_act; returns the output's shape."""
    image(op, "x", x)
    conv_weight(op, weight)
    like(op, "weight", weight, x, x.dtype)
    if _is_int(groups) and groups >= 1 and x.shape[-3] % groups == 0:
        shape(op, "weight", weight, (weight.shape[0], x.shape[-3] // groups, *weight.shape[2:]))
    return conv_args(
        op, x, shape_of(weight), scale, shift, residual, stride, padding, dilation, groups, act
    )


def add_relu(op: str, a: Any, b: Any) -> None:
    float_tensor(op, "a", a)
    tensor(op, "b", b)
    shape(op, "b", b, shape_of(a))
    like(op, "b", b, a, a.dtype, "a")
