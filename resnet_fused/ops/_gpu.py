"""What runs on a GPU: each plan's op, and what follows a convolution that PyTorch computes.

A block's last convolution and its shortcut's may be joined in one kernel: the 1x1 is more steps of
the same reduction. So may a stem's convolution and its max-pool, and the last two convolutions of a
bottleneck.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _gpu_kernels, check, reference
from ..conv_shape import Geometry
from . import _cuda, _triton

_ops = torch.ops.resnet_fused


def conv_op(plan: str) -> torch._ops.OpOverload:
    """conv_bn_act_triton or conv_bn_act_cuda."""
    return getattr(torch.ops.resnet_fused, f"conv_bn_act_{plan}").default


def conv(
    plan: str,
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *shortcut: Tensor,
    **keywords: Any,
) -> Tensor:
    """conv_op(plan) by the configuration that was measured, where one was. For "triton" the op
    looks for it itself."""
    if plan == "cuda":
        geometry = Geometry.of(keywords)
        branch = (shortcut[0].shape, keywords["shortcut_stride"]) if shortcut else None
        keywords["config"] = config(x.shape, x.dtype, x.device, scale.numel(), geometry, branch)
    return conv_op(plan)(x, packed, scale, shift, residual, *shortcut, **keywords)


def conv_by_rule(plan: str, *operands: Tensor | None, **keywords: Any) -> Tensor:
    """conv_op(plan) by its own choice, whatever was measured."""
    config = _triton.BY_RULE if plan == "triton" else ""
    return conv_op(plan)(*operands, config=config, **keywords)


def config(
    size: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    out_channels: int,
    geometry: Geometry,
    branch: tuple[Sequence[int], Sequence[int]] | None = None,
) -> str:
    """What was measured for a convolution of images of `size`; branch: the size of the images of a
    shortcut that is joined to it, and its stride."""
    branch_size, branch_stride = branch or ((), (1, 1))
    sizes = _cuda.Sizes(
        (1, *size)[-4:],
        out_channels,
        *geometry,
        shortcut_x=(1, *branch_size)[-4:] if branch else (),
        shortcut_stride=tuple(branch_stride),
        kind=_cuda.kind_of(dtype),
        device=device.index or 0,
    )
    return _cuda.measured(sizes, dtype)


def prepare(
    operands: tuple[Tensor, Tensor, Tensor],
    size: tuple[int, ...],
    device: torch.device,
    geometry: Geometry,
    act: str,
    *,
    adds: bool = False,
    shortcut: tuple[Tensor, Tensor, Tensor] | None = None,
    shortcut_size: tuple[int, ...] = (),
    shortcut_stride: Sequence[int] = (1, 1),
) -> Callable[..., Tensor]:
    """conv_bn_act_cuda with everything but the images fixed, as _triton.prepare."""
    op = conv_op("cuda")
    weight, scale, shift = operands
    branch = None if shortcut is None else (shortcut_size, shortcut_stride)
    found = config(size, weight.dtype, device, scale.numel(), geometry, branch)
    given = geometry._asdict() | {"act": act, "config": found}
    if shortcut is not None:
        given["shortcut_stride"] = shortcut_stride
    if shortcut is None:
        return lambda x, residual=None: op(x, weight, scale, shift, residual, **given)
    return lambda x, other: op(x, weight, scale, shift, None, other, *shortcut, **given)


class Prepared:
    """Launches a block, or a convolution, by one op; made with prepare_cuda's arguments."""

    __slots__ = ("__weakref__", "_prepared")

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self._prepared = _ops.prepare_cuda(*arguments, **keywords)
        # Not at exit: then the whole process ends.
        weakref.finalize(self, _gpu_kernels.release_prepared, self._prepared).atexit = False

    def __reduce__(self) -> tuple:
        """Of copies, which have parameters of their own, remains None."""
        return type(None), ()

    def __call__(self, x: Tensor) -> Tensor:
        return _ops.run_prepared_cuda.default(x, self._prepared)


def joins(last: dict[str, Any], shortcut: dict[str, Any]) -> bool:
    """Whether one kernel can compute both. last, shortcut: arguments of conv_bn_act_packed."""
    plain = (shortcut["kernel_size"], shortcut["padding"]) == ((1, 1), (0, 0))
    return (
        last["plan"] == shortcut["plan"]
        and check.PLAN_TRAITS[last["plan"]].device == "cuda"
        and plain
        and (last["groups"], shortcut["groups"]) == (1, 1)
        and shortcut["act"] == "none"
    )


def conv_with_shortcut(
    y: Tensor, last: dict[str, Any], x: Tensor, shortcut: dict[str, Any]
) -> Tensor:
    """act(conv(y) * scale + shift + conv1x1(x) * scale + shift), each with its own."""
    keywords = {name: value for name, value in last.items() if name not in _OPERANDS}
    return conv(
        *(last["plan"], y, last["packed"], last["scale"], last["shift"], None),
        *(x, shortcut["packed"], shortcut["scale"], shortcut["shift"]),
        shortcut_stride=shortcut["stride"],
        **keywords,
    )


# Of conv_bn_act_packed, and no keywords of conv_op.
_OPERANDS = ("packed", "scale", "shift", "plan", "pool")


def pools_at_once(
    plan: str,
    device: torch.device,
    dtype: torch.dtype,
    size: Sequence[int],
    out_channels: int,
    geometry: Geometry,
) -> bool:
    """Whether one kernel computes a convolution of images of `size`, (N, C, H, W), that adds no
    residual, and the max-pool behind it."""
    return (
        plan == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and (geometry.groups, *geometry.dilation) == (1, 1, 1)
        and _gpu_kernels.cuda_error(device) is None
        and not _ops.conv_bn_act_pool_refusal(list(size), out_channels, *map(list, geometry[:3]))
    )


def conv_with_pool(
    x: Tensor, packed: Tensor, scale: Tensor, shift: Tensor, geometry: Geometry, act: str
) -> Tensor:
    """maxpool(act(conv(x) * scale + shift)), where pools_at_once says so."""
    return _ops.conv_bn_act_pool_cuda(
        *(x, packed, scale, shift),
        kernel_size=geometry.kernel_size,
        stride=geometry.stride,
        padding=geometry.padding,
        act=act,
    )


# The widest map between two convolutions that stays in one kernel of mma.sync. By derivation, on an
# A100: with C channels between and 4 C behind, it moves 9 C elements a pixel where two kernels move
# 11 C, and takes 13 C * C products. At C = 64 that is 1152 bytes, 0.77 ns of memory, and 0.34 ns of
# products: the saving is time. At C = 128 products take four times as long and memory twice. Where
# the two kernels have wgmma they win, as measured on an H100 in bfloat16: 354 us instead of 358 at
# C = 64 and 56 x 56 with 128 images, 179 instead of 324 at C = 128 and 28 x 28, 8.4 instead of 28.6
# for one image.
TAIL_BETWEEN = 64
# Pixels of a block, csrc/cuda/sm80/tail.h, and the least blocks for each multiprocessor: with
# fewer, nobody works while one waits for memory, and single convolutions have smaller tiles.
_TAIL_PIXELS, _TAIL_BLOCKS = 128, 2


def is_tail(before: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether a block may end in one kernel for both: arguments of conv_bn_act_packed."""
    geometry = (last["kernel_size"], last["stride"], last["padding"], last["groups"])
    return (
        before["plan"] == last["plan"] == "cuda"
        and geometry == ((1, 1), (1, 1), (0, 0), 1)
        and before["groups"] == 1
        and before["packed"].dtype in (torch.bfloat16, torch.float16)
        and before["scale"].shape[0] <= TAIL_BETWEEN
        and not before.get("pool")
        and not last.get("pool")
    )


def tails(
    device: torch.device, size: Sequence[int], before: dict[str, Any], last: dict[str, Any]
) -> bool:
    """Whether one kernel computes the last two convolutions of a block that adds its input as it
    is. size: (N, C, H, W) of what goes into the first of them."""
    if not is_tail(before, last) or _gpu_kernels.cuda_error(device) is not None:
        return False
    if _cuda.has_wgmma(device):
        return False
    geometry = Geometry.of(before)
    channels = (before["scale"].shape[0], last["scale"].shape[0])
    out = geometry.out_size("conv_bn_act_packed", size)
    least = _TAIL_BLOCKS * _TAIL_PIXELS * _cuda.multiprocessors(device)
    return size[0] * out[0] * out[1] >= least and not _ops.bottleneck_tail_refusal(
        list(size), *channels, *map(list, geometry[:4])
    )


Ending = Literal["tail", "joined", "separate"]


def ending(
    device: torch.device,
    size: Sequence[int],
    main: Sequence[dict[str, Any]],
    shortcut: dict[str, Any] | None,
) -> Ending:
    """How a residual block ends: with one kernel for the last two convolutions of its main path
    ("tail"), one for the last and its shortcut's ("joined"), or one for each ("separate").

    main, shortcut: arguments of conv_bn_act_packed. size: (N, C, H, W) of what goes into the last
    but one of `main`.
    """
    if shortcut is not None:
        return "joined" if joins(main[-1], shortcut) else "separate"
    return "tail" if len(main) > 1 and tails(device, size, *main[-2:]) else "separate"


def conv_tail(x: Tensor, before: dict[str, Any], last: dict[str, Any], residual: Tensor) -> Tensor:
    """Both convolutions and the residual behind them, where `tails` says so."""
    names = ("kernel_size", "stride", "padding", "dilation", "act")
    return _ops.bottleneck_tail_cuda(
        *(x, before["packed"], before["scale"], before["shift"]),
        *(last["packed"], last["scale"], last["shift"], residual),
        **{name: before[name] for name in names},
        last_act=last["act"],
    )


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b), checked before, by one kernel where there is one for the device."""
    if a.dtype != torch.float64:
        if _gpu_kernels.cuda_error(a.device) is None:
            return _ops.add_relu_cuda(a, b)
        if _gpu_kernels.triton_error(a.device) is None:
            return _ops.add_relu_triton(a, b)
    return reference.add_relu(a, b)


def conv_by_torch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    act: str,
) -> Tensor:
    """PyTorch's convolution, and what follows it in one pass where there is a kernel for that."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if x.dtype != torch.float64 and _gpu_kernels.cuda_error(x.device) is None:
        return _ops.scale_shift_act_cuda(y, scale, shift, residual, act=act)
    return reference.scale_shift_act(y, scale, shift, residual, act)
