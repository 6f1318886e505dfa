"""A net of resnet_fused.models as plain data, batch norms folded into weights and biases.

For engines that have their own fused convolutions: aten's cuDNN ops here, XLA in gpu_jax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import packing
from resnet_fused._survey import survey
from resnet_fused.recipe import ConvUnit


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution with a bias. weight: (K, C / groups, R, S); bias: (K,)."""

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    relu: bool

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        return self.stride, self.padding, self.dilation, self.groups


@dataclass(frozen=True, eq=False)
class Block:
    """relu(main(x) + shortcut(x)); the identity where shortcut is None."""

    main: tuple[Conv, ...]
    shortcut: Conv | None


@dataclass(frozen=True, eq=False)
class Net:
    """Stem, max-pool 3x3 with stride 2, blocks, average over the map, linear layer."""

    stem: Conv
    blocks: tuple[Block, ...]
    weight: Tensor
    bias: Tensor


def folded_net(model: nn.Module) -> Net:
    """model: a plain net of resnet_fused.models in eval mode. Weights keep dtype and device."""
    found = survey(model)
    ((_, site),) = found.sites
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    blocks = [
        Block(
            tuple(folded_conv(unit) for unit in recipe.main),
            None if recipe.shortcut is None else folded_conv(recipe.shortcut),
        )
        for _, recipe in found.blocks
    ]
    return Net(folded_conv(site.unit), tuple(blocks), linear.weight.detach(), linear.bias.detach())


def folded_conv(unit: ConvUnit) -> Conv:
    """Folded in float32, then rounded to the weights' dtype; channels_last."""
    with torch.no_grad():
        scale, shift = packing.fold(unit)
        weight = unit.conv.weight.float() * scale[:, None, None, None]
    dtype = unit.conv.weight.dtype
    keywords = packing.conv_keywords(unit)
    return Conv(
        weight.to(dtype).contiguous(memory_format=torch.channels_last),
        shift.to(dtype),
        tuple(keywords["stride"]),
        tuple(keywords["padding"]),
        tuple(keywords["dilation"]),
        keywords["groups"],
        unit.act == "relu",
    )


AddRelu = Callable[[Tensor, Conv, Tensor], Tensor]


@dataclass(frozen=True)
class Ops:
    """conv(x, conv): with its bias and ReLU; add(x, conv, z): relu(conv(x) + bias + z)."""

    conv: Callable[[Tensor, Conv], Tensor]
    add: AddRelu


def run(net: Net, x: Tensor, ops: Ops) -> Tensor:
    """Logits (N, classes) of x (N, C, H, W)."""
    y = F.max_pool2d(ops.conv(x, net.stem), 3, 2, 1)
    for block in net.blocks:
        shortcut = y if block.shortcut is None else ops.conv(y, block.shortcut)
        for conv in block.main[:-1]:
            y = ops.conv(y, conv)
        y = ops.add(y, block.main[-1], shortcut)
    return F.linear(y.mean((2, 3)), net.weight, net.bias)


def _separate_conv(x: Tensor, conv: Conv) -> Tensor:
    y = F.conv2d(x, conv.weight, conv.bias, *conv.geometry)
    return y.relu_() if conv.relu else y


def _separate_add(x: Tensor, conv: Conv, z: Tensor) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, *conv.geometry).add_(z).relu_()


def _cudnn_conv(x: Tensor, conv: Conv) -> Tensor:
    if not conv.relu:
        return _separate_conv(x, conv)
    return torch.ops.aten.cudnn_convolution_relu(x, conv.weight, conv.bias, *conv.geometry)


def _cudnn_add(x: Tensor, conv: Conv, z: Tensor) -> Tensor:
    return torch.ops.aten.cudnn_convolution_add_relu(
        x, conv.weight, z, 1.0, conv.bias, *conv.geometry
    )


SEPARATE = Ops(_separate_conv, _separate_add)  # PyTorch's convolution, the rest in place behind it
CUDNN = Ops(_cudnn_conv, _cudnn_add)  # one kernel each; on a GPU only
