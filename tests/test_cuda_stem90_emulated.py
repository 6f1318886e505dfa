"""The Hopper stem's kernel, run on the CPU from its own source, against float64 and, on whole
numbers, against eager PyTorch bit for bit.

No GPU takes part: csrc/cuda/emulate stands for wgmma, cp.async and mma.sync.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from emulated_sm90 import ROOT, Conv, beyond_allowed, why_not
from emulated_stem import (
    Stem,
    agreeing,
    check_exact,
    drawn,
    whole,
)
from emulated_stem90 import TILES, Choice, Grid, build, run

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
every_tile = pytest.mark.parametrize("columns", TILES)
both_kernels = pytest.mark.parametrize(
    ("columns", "dtype"), [(112, torch.bfloat16), (64, torch.float16)], ids=str
)
RESNET = Conv(1, 40, 40, 3, 64, kernel=7, stride=2)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build(ROOT / "build" / "emulated")


def agrees(library: ctypes.CDLL, data: Stem, columns: int = 112, **how) -> torch.Tensor:
    return agreeing(data, run(library, data, columns, **how))


def is_exact(library: ctypes.CDLL, data: Stem, columns: int = 112, **how) -> None:
    check_exact(data, run(library, data, columns, **how))


# ---- every geometry ----------------------------------------------------------------------------

GEOMETRIES = (
    RESNET,
    Conv(1, 14, 224, 3, 64, kernel=7, stride=2),  # ResNet's own rows
    Conv(2, 9, 259, 3, 8, kernel=7, stride=2),  # several runs of columns, and odd rows
    Conv(1, 10, 454, 1, 8, stride=2),
    Conv(3, 37, 41, 1, 24, kernel=7, stride=2),
    Conv(2, 29, 26, 3, 128, kernel=7, stride=2),
    Conv(1, 30, 27, 4, 72, kernel=7, stride=2),
    Conv(1, 33, 35, 3, 8, stride=2),
    Conv(1, 34, 32, 3, 64, kernel=5, stride=2, padding=3),  # three taps that are none
    Conv(1, 51, 47, 3, 16, kernel=7, stride=(4, 2)),
    Conv(1, 21, 40, 3, 72, kernel=(5, 2), stride=(1, 2), padding=(0, 2)),
    Conv(2, 23, 24, 1, 64, kernel=(3, 8), stride=(3, 2), padding=(2, 3)),  # no tap is none
    Conv(1, 22, 18, 2, 8, kernel=1, stride=2),
    Conv(1, 22, 17, 2, 8, kernel=(1, 12), stride=(3, 2), padding=(0, 5)),  # fewer rows than stride
    Conv(1, 9, 9, 3, 64, kernel=3, stride=2, padding=(6, 7)),  # outputs of padding alone
    Conv(2, 1, 1, 3, 8, kernel=7, stride=2),
    Conv(3, 3, 2, 1, 24, kernel=7, stride=2),
    Conv(1, 7, 60, 3, 64, kernel=7, stride=2),
    Conv(1, 70, 5, 3, 64, kernel=7, stride=2),
)


@both_kernels
@pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
def test_geometries(library, conv, dtype, columns):
    conv = replace(conv, dtype=dtype)
    agrees(library, drawn(conv), columns, blocks=3)
    is_exact(library, whole(replace(conv, relu=False)), columns, rows=3, blocks=1, order=2)


@every_tile
@pytest.mark.parametrize("order", range(3))
def test_schedules_and_blocks_do_not_change_a_bit(library, columns, order):
    """A block for each band, and blocks that compute several: which one does not matter."""
    data = drawn(replace(RESNET, n=2, h=45, w=22, k=72))
    alone = agrees(library, data, columns, rows=12, blocks=1000)
    for blocks, rows in ((1, 5), (2, 1), (3, 2)):
        y = agrees(library, data, columns, rows=rows, blocks=blocks, order=order)
        assert torch.equal(alone, y)


# ---- what is not finite ------------------------------------------------------------------------


@every_tile
def test_what_is_not_finite_changes_no_other_band(library, columns):
    """By masks or not: sums of whole numbers are the same."""
    data = whole(replace(RESNET, n=2, relu=False))
    data.x[1, 0, 20, 20] = torch.inf
    y, report = run(library, data, columns, rows=3, blocks=1)
    assert not report
    assert not beyond_allowed(data, y)
    finite = data.exact.isfinite()
    assert torch.equal(y[finite], data.exact[finite])


# ---- the plan ----------------------------------------------------------------------------------


def choice(library, conv: Conv) -> tuple[int, int, Grid]:
    problem, chosen, grid = drawn(conv).problem(), Choice(), Grid()
    library.stem90_choice(ctypes.byref(problem), 132, ctypes.byref(chosen), ctypes.byref(grid))
    return TILES[chosen.tile], chosen.rows, grid


def test_choice():
    """One image: many short bands. Many: whole rows, and all that fit on the device at a time."""
    library = build(ROOT / "build" / "emulated")
    stem = Conv(1, 224, 224, 3, 64, kernel=7, stride=2)
    columns, rows, grid = choice(library, stem)
    assert (columns, rows, grid.blocks) == (64, 1, 112)
    columns, rows, grid = choice(library, replace(stem, n=128, h=224))
    assert (columns, rows, grid.blocks) == (112, 19, 384)
    assert 3 * (grid.shared_bytes + 1024) <= 228 << 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, ""),
        ({"k": 12}, "channels in multiples of 8, at most 4194240, got 12"),
        ({"stride_w": 1}, "needs columns of stride 2, got 1"),
        ({"c": 5}, "expands pixels to 4 channels, got 5"),
        ({"s": 41}, "would need more than 232448 bytes of shared memory"),
        ({"stride_h": 2**20}, "would need more than 232448 bytes of shared memory"),
        ({"dilation_w": 2}, "has no groups, dilation or shortcut"),
        ({"groups": 3}, "has no groups, dilation or shortcut"),
    ],
)
def test_refusals(library, change, sentence):
    problem, why = drawn(RESNET).problem(), ctypes.create_string_buffer(200)
    for name, value in change.items():
        setattr(problem, name, value)
    library.stem90_why_not(ctypes.byref(problem), why, 200)
    assert sentence in why.value.decode()
    assert bool(sentence) is bool(why.value)
