"""The rule that chooses a plan on the CPU where nothing was measured: by counting multiplications.

It looks at the weights, the size of the map and, where there are too few pixels to hide the loading
of transformed weights, the batch.
"""

from __future__ import annotations

import torch

from . import _extension
from .backends import can_compute
from .check import PLAN_TRAITS
from .conv_shape import Choice, ConvShape

# Below this many output channels per group most lanes of a 32-channel panel would multiply zeros.
_MIN_GROUP_OUT = 16
# The instruction set whose kernels multiply bfloat16 in pairs.
_PAIRS = "avx512bf16"


# The cost of a plan, in multiplications per image and pair of input and output channel: its points
# times its tiles, but at least as many tiles as take the time of loading a point's weights: 15
# where these come from memory (115 GMAC/s and 31 GB/s), 12 where they pass through from L3 (about 3
# multiplications a byte), 4 where they stay in L2 and only the latency of the multiplier must be
# filled. Products of bfloat16 take half the time, and so do their weights.
_TILES_OF_A_LOAD = ((1 << 20, 4), (16 << 20, 12))  # weights up to so many bytes: tiles
_TILES_OF_A_LOAD_FROM_MEMORY = 15
# PyTorch's convolution loads bfloat16 weights, stores them in its order and loads them again. On a
# Zen 4 held to AVX2 this choice made ResNet-50 1.16, 1.45 and 1.38 times as fast at batch 1, 8, 32,
# ResNet-18 0.99, 1.08, 1.08.
_TILES_OF_A_REORDER = 22
# Transforms take a tenth to a fifth of a Winograd convolution's time. They pay at any channel
# count: with 4 channels and 56 x 56 pixels F(4x4) takes 41 us, the direct kernel 59.
_TRANSFORMS = 1.25
# This one transforms its weights anew for every 4 tiles, which takes as long as 1.6; it needs 32
# registers (csrc/cpu/winograd_raw_body.h).
_RAW = "winograd4_raw"
_TILES_AT_ONCE, _TILES_OF_A_TRANSFORM = 4, 1.6
# plan -> (products of a tile, side of a tile in output pixels, time of a product)
_COSTS = {
    "direct": (9, 1, 1.0),
    "winograd2": (16, 2, _TRANSFORMS),
    "winograd4": (36, 4, _TRANSFORMS),
    _RAW: (36, 4, _TRANSFORMS),
    "winograd2s2": (25, 2, _TRANSFORMS),
    "winograd4s2": (81, 4, _TRANSFORMS),
    "direct_bf16": (9, 1, 0.5),
    "winograd2_bf16": (16, 2, _TRANSFORMS / 2),
    "winograd2s2_bf16": (25, 2, _TRANSFORMS / 2),
}


def _cost(plan: str, shape: ConvShape) -> float:
    points, side, time = _COSTS[plan]
    tiles = shape.batch * -(-shape.out_size[0] // side) * -(-shape.out_size[1] // side)
    if plan == _RAW:
        transforms = -(-tiles // _TILES_AT_ONCE)
        return points * (tiles + transforms * _TILES_OF_A_TRANSFORM) * time / max(shape.batch, 1)
    weights = points * shape.in_channels * shape.out_channels * (2 if time < 1 else 4)
    least = _TILES_OF_A_LOAD_FROM_MEMORY
    for size, count in reversed(_TILES_OF_A_LOAD):
        if weights <= size:
            least = count
    return points * max(tiles, least) * time / max(shape.batch, 1)


def why_torch(shape: ConvShape, ours: str) -> str:
    """Why PyTorch's convolution goes before the plan that the rule would take of ours, "" where
    that stays."""
    bfloat16 = shape.dtype == torch.bfloat16
    if bfloat16 and "amx_bf16" in _extension.CPU_FEATURES:
        # Matrix units: 8 times the products of our kernels' vectors.
        return "PyTorch multiplies bfloat16 with amx_bf16, our kernel with vectors"
    group_out = shape.out_channels // shape.groups
    if shape.groups > 1 and group_out < _MIN_GROUP_OUT:
        return f"{group_out} output channels a group are less than half a panel"
    if bfloat16 and _leaves_pairs_to_torch(shape, ours):
        return f"PyTorch multiplies pairs of bfloat16, our {_extension.cpu_isa()} kernel singly"
    return ""


def _leaves_pairs_to_torch(shape: ConvShape, ours: str) -> bool:
    """Whether pairs of bfloat16, which the CPU has but the kernels in use have not, take PyTorch's
    direct convolution less time than ours without them."""
    beside_ours = _PAIRS in _extension.CPU_FEATURES and _extension.cpu_isa() != _PAIRS
    if not beside_ours or ours not in _COSTS:  # the stem's kernel pools, too
        return False
    reordering = _COSTS["direct_bf16"][0] * _TILES_OF_A_REORDER / max(shape.batch, 1)
    return _cost("direct_bf16", shape) + reordering < _cost(ours, shape)


# The stem's kernel multiplies 13 rows for 4 of output where a direct convolution has 28. Measured
# with 1 to 256 input channels and maps up to 1080 x 1920 it takes 0.43 to 0.67 of the direct
# kernel's time, 0.9 at 4 rows of output, as much at 2.
_STEM_LEAST_ROWS = 3
# bfloat16 pairs halve a direct convolution's products, too, but with an odd number of channels a
# tap's last pair is half empty, and of few channels the gathering takes much.
_STEM_MOST_CHANNELS_BF16 = 4


def _stem(shape: ConvShape, direct: str) -> Choice:
    if shape.out_size[0] < _STEM_LEAST_ROWS:
        return Choice(direct, "too few rows to pay for Winograd along them")
    if direct == "direct_bf16" and shape.in_channels > _STEM_MOST_CHANNELS_BF16:
        return Choice(direct, "pairs of bfloat16 have no more products than Winograd along rows")
    return Choice("stem", "7 rows of taps, stride 2: 13 products where the direct one has 28")


def ours(shape: ConvShape, exact_nonfinite: bool) -> Choice:
    able = [plan for plan in _COSTS if can_compute(plan, shape)]
    direct = "direct_bf16" if "direct_bf16" in able else "direct"
    winograd = [plan for plan in able if PLAN_TRAITS[plan].spreads]
    if not _extension.cpu_isa().startswith("avx512"):
        winograd = [plan for plan in winograd if plan != _RAW]
    stem = can_compute("stem", shape)
    if not winograd and not stem:
        return Choice(direct, "implicit GEMM over packed weights")
    if exact_nonfinite:
        return Choice(direct, "exact_nonfinite keeps NaN and Inf where they belong")
    if stem:
        return _stem(shape, direct)
    best, least, limit = direct, _cost(direct, shape), _cost(direct, shape)
    for plan in winograd:
        cost = _cost(plan, shape)
        if cost < least:
            best, least = plan, cost
    if best == direct:
        return Choice(direct, "too few pixels to pay for loading transformed weights")
    side = shape.stride[0]
    # A graph that is captured for every size knows no number, and nobody reads its reason.
    share = "less than" if torch.compiler.is_compiling() else f"{least / limit:.0%} of"
    return Choice(best, f"3x3, stride {side}: {share} the direct convolution's cost")
