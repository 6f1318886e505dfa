"""Convolutions on a GPU: the op of each plan, and a block's last one joined with its shortcut's.

Both convolutions of such a pair run in one kernel: the 1x1 is more steps of the same reduction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import check


def conv_op(plan: str) -> torch._ops.OpOverload:
    """conv_bn_act_triton or conv_bn_act_cuda."""
    return getattr(torch.ops.resnet_fused, f"conv_bn_act_{plan}").default


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
    return conv_op(last["plan"])(
        *(y, last["packed"], last["scale"], last["shift"], None),
        *(x, shortcut["packed"], shortcut["scale"], shortcut["shift"]),
        shortcut_stride=shortcut["stride"],
        **keywords,
    )


_OPERANDS = ("packed", "scale", "shift", "plan")
