"""The distinct convolutions of a net, found by the code that fuses it: no list of shapes is typed.

`rf.fuse`'s own survey says which convolutions there are, what follows each (activation, addition);
running the net once without data (device "meta") says how large each one's input is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from resnet_fused._survey import join, survey
from resnet_fused.packing import conv_keywords, kernel_size
from resnet_fused.recipe import ConvUnit

from .common import plain_net


@dataclass(frozen=True)
class Layer:
    """act(bn(conv(x)) + residual) for one image; equal layers of a net are one Layer."""

    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    act: str
    residual: bool
    stage: int = field(compare=False)  # blocks with one size of output, from 1; 0 outside blocks
    name: str = field(compare=False)  # dotted path of the first one
    count: int = field(compare=False, default=1)  # how many the net has

    @property
    def out_size(self) -> tuple[int, int]:
        rows, cols = (
            (size + 2 * pad - step * (taps - 1) - 1) // stride + 1
            for size, pad, step, taps, stride in zip(
                self.in_size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return rows, cols

    @property
    def text(self) -> str:
        """ "3x3/2 64>128 56" : kernel, stride, channels, input rows."""
        stride = "" if self.stride == (1, 1) else f"/{self.stride[0]}"
        groups = "" if self.groups == 1 else f" g{self.groups}"
        return (
            f"{self.kernel[0]}x{self.kernel[1]}{stride} {self.in_channels}>{self.out_channels} "
            f"{self.in_size[0]}{groups}{' +res' if self.residual else ''}"
        )

    def unit(self, seed: int = 0) -> ConvUnit:
        """Such a convolution with its batch norm, in float32; seeded, with outputs of order 1."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            conv = nn.Conv2d(
                self.in_channels,
                self.out_channels,
                self.kernel,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                bias=False,
            )
            bn = nn.BatchNorm2d(self.out_channels).eval()
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            bn.running_mean.normal_(0, 0.1)
            bn.running_var.uniform_(0.5, 1.5)
        return ConvUnit(
            conv.requires_grad_(False), bn.requires_grad_(False), self.act, "conv", "bn"
        )


def layers_of(net: str, size: int = 224) -> list[Layer]:
    """The distinct convolutions of `models.<net>` for images of `size`, in the order of the net."""
    return distinct_layers(plain_net(net), size)


def distinct_layers(model: nn.Module, size: int) -> list[Layer]:
    """The same for any plain model whose residual blocks and conv-BN sequences can be fused."""
    layers: dict[Layer, Layer] = {}
    for layer in all_layers(model, size):
        first = layers.get(layer, replace(layer, count=0))
        layers[layer] = replace(first, count=first.count + 1)
    return list(layers.values())


def all_layers(model: nn.Module, size: int) -> list[Layer]:
    """Every convolution on its own, in the order of the calls."""
    sizes = _input_sizes(model, size)
    order = {name: i for i, name in enumerate(sizes)}
    return sorted(_find(model, sizes), key=lambda layer: order[layer.name])


def _find(model: nn.Module, sizes: dict[str, tuple[int, int]]) -> Iterator[Layer]:
    found = survey(model)
    for parent, site in found.sites:
        name = join(parent, site.unit.conv_name)
        yield _layer(name, site.unit, sizes[name], residual=False, stage=0)
    stages: dict[tuple[int, int], int] = {}  # output size of a block -> its stage
    for block, recipe in found.blocks:
        units = [(join(block, unit.conv_name), unit) for unit in recipe.units()]
        last = [
            _layer(name, unit, sizes[name], residual=unit is recipe.main[-1], stage=0)
            for name, unit in units
        ]
        stage = stages.setdefault(last[-1].out_size, len(stages) + 1)
        yield from (replace(layer, stage=stage) for layer in last)


def _layer(
    name: str, unit: ConvUnit, size: tuple[int, int], *, residual: bool, stage: int
) -> Layer:
    keywords = conv_keywords(unit)
    return Layer(
        in_channels=unit.conv.in_channels,
        out_channels=unit.conv.out_channels,
        in_size=size,
        kernel=kernel_size(unit.conv),
        stride=tuple(keywords["stride"]),
        padding=tuple(keywords["padding"]),
        dilation=tuple(keywords["dilation"]),
        groups=keywords["groups"],
        act=keywords["act"],
        residual=residual,
        stage=stage,
        name=name,
    )


def _input_sizes(model: nn.Module, size: int) -> dict[str, tuple[int, int]]:
    """Name of each convolution -> rows and columns of its input, in the order of the calls."""
    shadow = copy.deepcopy(model).to("meta", torch.float32).eval()
    convs = {name: m for name, m in shadow.named_modules() if isinstance(m, nn.Conv2d)}
    sizes: dict[str, tuple[int, int]] = {}

    def remember(name: str, args: tuple[Tensor, ...]) -> None:
        sizes[name] = tuple(args[0].shape[-2:])

    for name, conv in convs.items():
        conv.register_forward_pre_hook(lambda _, args, name=name: remember(name, args))
    channels = next(iter(convs.values())).in_channels
    with torch.no_grad():
        shadow(torch.empty(1, channels, size, size, device="meta"))
    return sizes
