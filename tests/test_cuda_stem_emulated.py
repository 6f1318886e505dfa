"""The stem's kernel, convolution and max-pool in one, run on the CPU from its own source, against
float64 and, on whole numbers, against eager PyTorch bit for bit.

No GPU takes part: csrc/cuda/emulate stands for cp.async, ldmatrix and mma.sync.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from emulated_sm80 import Grid
from emulated_sm90 import ROOT, Conv, why_not
from emulated_stem import (
    TILES,
    Stem,
    agreeing,
    build,
    check_exact,
    drawn,
    run,
    whole,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
every_tile = pytest.mark.parametrize("rows", TILES)
both_kernels = pytest.mark.parametrize(
    ("rows", "dtype"), [(8, torch.bfloat16), (4, torch.float16)], ids=str
)
RESNET = Conv(1, 40, 40, 3, 64, kernel=7, stride=2)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build(ROOT / "build" / "emulated")


def agrees(library: ctypes.CDLL, data: Stem, rows: int = 8, **how) -> torch.Tensor:
    return agreeing(data, run(library, data, rows, **how))


def is_exact(library: ctypes.CDLL, data: Stem, rows: int = 8, **how) -> None:
    check_exact(data, run(library, data, rows, **how))


# ---- every geometry ----------------------------------------------------------------------------

GEOMETRIES = (
    RESNET,
    Conv(3, 37, 41, 1, 24, kernel=7, stride=2),  # odd rows: element by element
    Conv(2, 29, 26, 3, 128, kernel=7, stride=2),  # rows of whole words only
    Conv(1, 30, 27, 4, 72, kernel=7, stride=2),
    Conv(1, 33, 35, 3, 8, stride=2),
    Conv(1, 34, 32, 3, 64, kernel=5, stride=2, padding=3),
    Conv(1, 51, 47, 3, 16, kernel=7, stride=4),
    Conv(1, 17, 19, 4, 64),  # stride 1
    Conv(2, 18, 16, 2, 40, kernel=4, padding=1),
    Conv(1, 19, 20, 16, 64),
    Conv(1, 21, 40, 3, 72, kernel=(5, 2), stride=(1, 2), padding=(0, 2)),
    Conv(2, 23, 24, 1, 64, kernel=(3, 8), stride=(3, 2), padding=(2, 3)),  # one segment more
    Conv(1, 22, 18, 2, 8, kernel=1),  # one segment, without a pair
    Conv(1, 9, 9, 3, 64, kernel=3, stride=2, padding=(6, 7)),  # outputs of padding alone
    Conv(2, 1, 1, 3, 8, kernel=7, stride=2),
    Conv(3, 3, 2, 1, 24, kernel=7, stride=2),
    Conv(1, 7, 60, 3, 64, kernel=7, stride=2),
    Conv(1, 70, 5, 3, 64, kernel=7, stride=2),
)


@both_kernels
@pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
def test_geometries(library, conv, dtype, rows):
    conv = replace(conv, dtype=dtype)
    agrees(library, drawn(conv), rows, blocks=3)
    is_exact(library, whole(replace(conv, relu=False)), rows, blocks=1, order=rows)


@every_tile
@pytest.mark.parametrize("order", range(3))
def test_schedules_and_blocks_do_not_change_a_bit(library, rows, order):
    """A block for each tile, and blocks that compute several: which one does not matter."""
    data = drawn(replace(RESNET, h=45, w=22, k=72))
    alone = agrees(library, data, rows, blocks=1000)
    for blocks in (1, 2):
        assert torch.equal(alone, agrees(library, data, rows, blocks=blocks, order=order))


# ---- the plan ----------------------------------------------------------------------------------

A100, H100, SM86 = (108, 164 << 10), (132, 228 << 10), (82, 100 << 10)


def choice(library, conv: Conv, device) -> tuple[int, Grid]:
    problem, grid = drawn(conv).problem(), Grid()
    return TILES[library.stem_choice(ctypes.byref(problem), *device, ctypes.byref(grid))], grid


@pytest.mark.parametrize("device", [A100, H100, SM86])
def test_choice(library, device):
    """Small tiles where one image's do for all; large ones for many; what runs at a time fits."""
    stem = Conv(1, 224, 224, 3, 64, kernel=7, stride=2)
    rows, grid = choice(library, stem, device)
    assert (rows, grid.tiles) == ((8, 49) if device == SM86 else (4, 98))
    rows, grid = choice(library, replace(stem, n=32), device)
    assert rows == 8
    resident = grid.tiles / device[0]
    assert resident == int(resident) >= 1
    assert resident * (grid.shared_bytes + 1024) <= device[1]
    assert (grid.splits, grid.threads) == (1, 128)


def test_a_tile_that_fits_is_chosen(library):
    """Of 24 channels the large tile takes more shared memory than a block may have."""
    rows, grid = choice(library, Conv(64, 128, 128, 24, 64, stride=2), A100)
    assert rows == 4
    assert grid.shared_bytes <= 99 << 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, ""),
        ({"k": 12}, "needs output channels in multiples of 8, got 12"),
        ({"stride_w": 1}, "an even stride or number of channels, got stride 1 and 3 channels"),
        ({"stride_w": 3}, "an even stride or number of channels, got stride 3 and 3 channels"),
        ({"c": 64}, "would need 539280 bytes of shared memory, more than 101376"),
        ({"h": 2**20, "stride_h": 2**20}, "bytes of shared memory, more than 101376"),
        ({"groups": 3}, "has no groups, dilation or shortcut"),
        ({"dilation_w": 2}, "has no groups, dilation or shortcut"),
        ({"n": 2**20, "h": 512}, "its indices have 31 bits, and a tensor has"),
        ({"c": 0}, "the tensor is empty"),
        ({"pad_h": 2**30}, "its taps reach further than indices of 31 bits do"),
        (
            {"c": 64, "s": 1, "r": 1, "pad_w": 2**25, "w": 8, "k": 8, "h": 1, "pad_h": 0},
            "its taps reach further than indices of 31 bits do",
        ),
        (
            {"c": 2, "s": 1, "r": 1, "h": 8, "w": 8, "k": 2**23},
            "has at most 4194240 output channels, got 8388608",
        ),
    ],
)
def test_refusals(library, change, sentence):
    problem, why = drawn(RESNET).problem(), ctypes.create_string_buffer(200)
    for name, value in change.items():
        setattr(problem, name, value)
    library.stem_why_not(ctypes.byref(problem), why, 200)
    assert sentence in why.value.decode()
    assert bool(sentence) is bool(why.value)
