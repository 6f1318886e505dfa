"""What both kernels for a stem must get right, run on the CPU from their own source. What sets them
apart: test_cuda_stem_emulated.py, test_cuda_stem90_emulated.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import emulated_stem
import emulated_stem90
import pytest
import torch
from emulated_sm90 import ROOT, Conv, why_not
from emulated_stem import (
    NOT_FINITE_CHANNELS,
    Stem,
    agreeing,
    below_zero,
    check_exact,
    not_finite_anywhere,
    not_finite_channels,
    not_finite_of,
    overflowing,
    whole,
)
from torch import Tensor

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
RESNET = Conv(1, 40, 40, 3, 64, kernel=7, stride=2)
both_tiles = pytest.mark.parametrize("tile", [0, 1])


@dataclass(frozen=True)
class Kernel:
    """run(data, tile, ...): the output, and the emulator's report."""

    run: Callable[..., tuple[Tensor, str]]
    only_stride_2: bool

    def of(self, conv: Conv) -> Conv:
        """The convolution, of a stride that the kernel has."""
        return replace(conv, stride=2) if self.only_stride_2 and conv.stride == 1 else conv


@pytest.fixture(scope="module", params=["sm80", "sm90"])
def kernel(request) -> Kernel:
    stem = {"sm80": emulated_stem, "sm90": emulated_stem90}[request.param]
    library = stem.build(ROOT / "build" / "emulated")

    def run(data: Stem, tile: int = 0, **how: int) -> tuple[Tensor, str]:
        return stem.run(library, data, stem.TILES[tile], **how)

    return Kernel(run, only_stride_2=request.param == "sm90")


@both_tiles
@pytest.mark.parametrize("conv", [RESNET, Conv(2, 11, 13, 4, 24)], ids=str)
def test_what_is_outside_of_the_map_is_no_zero(kernel, conv, tile):
    conv = kernel.of(conv)
    data = below_zero(conv)
    check_exact(data, kernel.run(data, tile))
    for size in (31, 33):  # pooled rows and columns that end a tile, and one more
        data = whole(replace(conv, relu=False, h=size, w=size + 1))
        data.shift = data.shift - 200
        check_exact(data, kernel.run(data, tile))


def test_float16_overflows_as_it_does_in_eager(kernel):
    data = overflowing(RESNET)
    check_exact(data, kernel.run(data))


@pytest.mark.parametrize(("tile", "dtype"), [(0, torch.bfloat16), (1, torch.float16)], ids=str)
@pytest.mark.parametrize(
    "conv",
    [
        Conv(1, 20, 24, 3, 64, kernel=7, stride=2),
        Conv(1, 19, 23, 1, 8, kernel=7, stride=2),
        Conv(1, 15, 13, 4, 64),
        Conv(1, 20, 17, 3, 24, kernel=(2, 3), stride=(1, 2), padding=(1, 3)),
        Conv(1, 14, 18, 2, 8, kernel=1),
        Conv(1, 20, 24, 1, 24, kernel=(3, 8), stride=2, padding=3),
    ],
    ids=str,
)
def test_one_value_spreads_no_further_than_in_eager(kernel, conv, dtype, tile):
    data = not_finite_anywhere(kernel.of(conv), dtype)
    agreeing(data, kernel.run(data, tile, blocks=2))


def test_a_channel_keeps_what_is_not_finite_to_itself(kernel):
    data = not_finite_channels(replace(RESNET, k=72))
    assert not_finite_of(agreeing(data, kernel.run(data))) == NOT_FINITE_CHANNELS
