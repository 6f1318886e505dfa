"""How many multiplications a convolution is, and how many a plan of ours makes of it.

A Winograd plan computes a tile of m outputs in one dimension from s * m + k - s products (kernel k,
stride s; a stride of 2 is two interleaved convolutions of stride 1, "polyphase") where the direct
convolution takes k * m. Tiles that reach over the map's edge count in full: they cost as much.
"""

from __future__ import annotations

import re

from .layers import Layer

_WINOGRAD = re.compile(r"winograd(?P<tile>\d+)(s2)?(_bf16|_raw)?")
_STEM_ROWS = 4  # output rows of a tile of plan "stem", which transforms columns only


def direct_multiplications(layer: Layer, batch: int) -> int:
    """Of the direct convolution, every tap counted, also those that see padding."""
    pixels = batch * layer.out_size[0] * layer.out_size[1]
    return pixels * layer.kernel[0] * layer.kernel[1] * _channel_pairs(layer)


def multiplications(plan: str, layer: Layer, batch: int) -> int:
    """That the plan itself makes, transforms not counted. Raises ValueError for unknown plans."""
    rows, points = _product(plan, layer)
    return batch * rows * points * _channel_pairs(layer)


def rows(plan: str, layer: Layer, batch: int) -> int:
    """Of the plan's matrix product: output pixels, or tiles. Each weight serves so many."""
    return batch * _product(plan, layer)[0]


def _product(plan: str, layer: Layer) -> tuple[int, int]:
    """Rows of one image, and products that each makes of a pair of channels."""
    height, width = layer.out_size
    if plan in ("torch", "direct", "direct_bf16"):
        return height * width, layer.kernel[0] * layer.kernel[1]
    if plan == "stem":
        return -(-height // _STEM_ROWS) * width, _points(_STEM_ROWS, layer, 0) * layer.kernel[1]
    if match := _WINOGRAD.fullmatch(plan):
        tile = int(match["tile"])
        tiles = -(-height // tile) * -(-width // tile)
        return tiles, _points(tile, layer, 0) * _points(tile, layer, 1)
    raise ValueError(f"multiplications: plan must be one that is counted here, got {plan!r}")


def is_winograd(plan: str) -> bool:
    """Whether the plan makes fewer multiplications than the convolution has."""
    return plan == "stem" or plan.startswith("winograd")


def arithmetic(plan: str) -> str:
    """The dtype whose products the plan computes: what its peak is measured in."""
    return "bfloat16" if plan.endswith("_bf16") else "float32"


def _points(tile: int, layer: Layer, dimension: int) -> int:
    stride, kernel = layer.stride[dimension], layer.kernel[dimension]
    return stride * tile + kernel - stride


def _channel_pairs(layer: Layer) -> int:
    return layer.in_channels // layer.groups * layer.out_channels
