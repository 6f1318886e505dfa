"""The sm_80 kernel's own source, run on the CPU: every tile and way to multiply against float64,
its plan, and bugs planted in it, each of which must show.

No GPU takes part: cp.async, ldmatrix and mma.sync are emulated to their documents
(csrc/cuda/emulate).
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from emulated_sm80 import (
    DTYPES,
    NOT_COMPILED,
    ROOT,
    TILES,
    TYPES,
    Choice,
    Conv,
    Data,
    Grid,
    Workspace,
    build,
    draw,
    run,
    why_not,
    wrong,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

BUILT = ROOT / "build" / "emulated"
EMULATED = [
    (kind, tile)
    for kind in TYPES
    for tile in TILES
    if (kind, tile) not in NOT_COMPILED and (kind != "float16" or tile in ("64x64", "any64x64"))
]
every_kernel = pytest.mark.parametrize(("kind", "tile"), EMULATED)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build(BUILT)


def agrees(library: ctypes.CDLL, data: Data, tile: str, kind: str = "", **how) -> torch.Tensor:
    y, report = run(library, data, tile, kind, **how)
    assert not report
    assert not wrong(data, y, kind)
    return y


def channels(tile: str, whole: int, ragged: int) -> int:
    return ragged if tile.startswith("any") else whole


# ---- every kernel ------------------------------------------------------------------------------


@every_kernel
def test_ragged_sizes(library, kind, tile):
    """Sizes that divide nothing: pixels, images, channels, the last step of the reduction."""
    c, k = channels(tile, 24, 13), channels(tile, 88, 75)
    conv = Conv(3, 7, 9, c, k, residual=True, dtype=DTYPES[kind])
    agrees(library, draw(conv), tile, kind)
    agrees(library, draw(replace(conv, residual=False, relu=False, k=37)), tile, kind, order=2)


@every_kernel
def test_split_sums_have_the_same_bits_in_any_order(library, kind, tile):
    conv = Conv(2, 6, 7, channels(tile, 24, 11), 72, dtype=DTYPES[kind])
    data = draw(conv)
    results = [agrees(library, data, tile, kind, splits=3, order=order) for order in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(("tile", "splits"), [("64x32", 5), ("64x64", 7), ("128x64", 3)])
def test_splits_of_several_rounds(library, tile, splits):
    """Of which the last is not full, where a round holds more than one."""
    data = draw(Conv(1, 6, 5, 40, 72))
    results = [agrees(library, data, tile, splits=splits, order=order) for order in (0, 2)]
    assert torch.equal(*results)


@pytest.mark.parametrize("tile", ["64x32", "128x64", "any64x64"])
def test_launches_that_share_tickets(library, tile):
    """Nobody clears them in between."""
    agrees(library, draw(Conv(2, 6, 7, 24, 72)), tile, splits=3, order=2, launches=3)


def test_kept_tickets(library):
    """One buffer for each stream of each device, a larger one where that is needed."""
    get = library.kept_tickets
    get.restype = ctypes.c_int64
    get.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int)

    def kept(device, stream, count, fails=False):
        number, room = divmod(get(device, stream, count, fails), 2**32)
        return number, room

    assert kept(0, 0, 5, fails=True) == (0, 0)
    assert kept(0, 0, 5) == kept(0, 0, 4096) == kept(0, 0, 1, fails=True) == (1, 4096)
    assert kept(1, 0, 5) == (2, 4096)
    assert kept(0, 2**40, 5) == (3, 4096)
    assert kept(0, 0, 4097, fails=True) == (0, 0)
    assert kept(0, 0, 4096) == (1, 4096)
    assert kept(0, 0, 4097) == kept(0, 0, 1) == (4, 8192)
    assert kept(0, 0, 20000) == (5, 20000)
    assert kept(1, 0, 4096) == (2, 4096)


@every_kernel
@pytest.mark.parametrize("splits", [1, 4])
def test_shortcut_of_any_scales(library, kind, tile, splits):
    """Zero, tiny, negative on either side; a split may hold one range of the reduction or both."""
    if tile == "128x128":
        pytest.skip("not compiled")
    conv = Conv(2, 6, 7, channels(tile, 16, 15), 72, dtype=DTYPES[kind])
    data = draw(replace(conv, shortcut=channels(tile, 72, 41)))
    for scale in (data.scale, data.shortcut_scale):
        scale[:6] = torch.tensor([0.0, 1e-6, -1e-6, -2.0, 1e-30, -1e-40])
    data.scale[8:14] = data.scale[:6].clone()
    data.shortcut_scale[8:14] = data.shortcut_scale[:6].flip(0).clone()
    agrees(library, data, tile, kind, splits=splits, order=splits % 3)


GEOMETRIES = (
    Conv(2, 15, 13, 24, 40, kernel=(5, 3), stride=2, dilation=2),
    Conv(1, 12, 10, 16, 64, stride=(2, 1), padding=(0, 2)),
    Conv(1, 13, 12, 24, 40, kernel=(3, 5), stride=(1, 3), padding=(3, 0), dilation=(2, 1)),
    Conv(2, 15, 15, 64, 72, kernel=1, stride=2),
    Conv(1, 6, 5, 64, 64, kernel=1, padding=1),
    Conv(1, 30, 30, 8, 64, kernel=7, stride=2),
    Conv(1, 10, 9, 64, 64, kernel=(2, 4), padding=1),
    Conv(5, 1, 1, 64, 64),
    Conv(2, 20, 20, 8, 8, kernel=1, stride=8),
    Conv(2, 9, 9, 64, 64, shortcut=32, shortcut_stride=1),
    Conv(1, 9, 9, 64, 96, groups=4),
    Conv(1, 5, 6, 144, 144, groups=2, residual=True),
)
RAGGED_GEOMETRIES = (
    Conv(1, 22, 20, 3, 64, kernel=7, stride=2),
    Conv(2, 9, 8, 5, 6, kernel=(3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 2)),
    Conv(2, 7, 7, 12, 12, groups=12),
    Conv(1, 8, 7, 30, 45, groups=3, stride=2),
    Conv(2, 7, 7, 3, 16, shortcut=7),
    Conv(1, 1, 1, 1, 1),
)


@pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
@pytest.mark.parametrize("tile", ["64x32", "64x64k64"])
def test_geometries(library, tile, conv):
    agrees(library, draw(conv), tile)


@pytest.mark.parametrize("conv", RAGGED_GEOMETRIES, ids=str)
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_geometries_of_ragged_channels(library, kind, conv):
    agrees(library, draw(replace(conv, dtype=DTYPES[kind])), "any64x64", kind)


def test_float32_is_more_accurate_than_tf32(library):
    data = draw(Conv(1, 7, 7, 64, 64, dtype=torch.float32, relu=False))
    exact, rounded = (agrees(library, data, "64x64", kind) for kind in ("float32", "tf32"))
    errors = [float((y.double() - data.oracle).abs().max()) for y in (exact, rounded)]
    assert errors[0] < 1e-5 < errors[1]


# ---- what is not finite ------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2])
def test_nan_and_inf_reach_the_outputs_that_eager_gives_them_to(library, splits):
    data = draw(Conv(2, 8, 8, 40, 64, shortcut=24))
    data.x[0, 3, 2, 2] = float("nan")
    data.x[1, 3, 2, 2] = torch.inf
    data.shortcut_x[0, 5, 8, 8] = torch.inf
    data.shortcut_scale[::4] = 0  # 0 * Inf is NaN, as in eager PyTorch
    agrees(library, data, "64x64", splits=splits)


# ---- add_relu ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("count", "shift"), [(1, 0), (7, 0), (2048 + 64 + 5, 0), (1500, 1)])
def test_add_relu(library, kind, count, shift):
    """Less and more than a round of the grid, a tail that is no whole vector, unaligned tensors."""
    draw_normal = torch.Generator().manual_seed(count)
    a, b = (torch.randn(count, generator=draw_normal).to(DTYPES[kind]) for _ in range(2))
    a[count // 2] = float("nan")
    y, why = torch.full_like(a, -1.0), ctypes.create_string_buffer(800)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (a, b, y))
    library.sm80_add_relu(TYPES.index(kind), *pointers, ctypes.c_int64(count), shift, 2, why, 800)
    assert not why.value
    assert torch.equal(y.nan_to_num(7.0), torch.relu(a + b).nan_to_num(7.0))


# ---- the plan ----------------------------------------------------------------------------------


def plan(library, data: Data, kind: str, multiprocessors: int = 108):
    problem, choice, grid, workspace = data.problem(), Choice(), Grid(), Workspace()
    name = ctypes.create_string_buffer(80)
    library.sm80_choose(
        ctypes.byref(problem), TYPES.index(kind), multiprocessors, ctypes.byref(choice),
        ctypes.byref(grid), ctypes.byref(workspace), name, 80,
    )  # fmt: skip
    return choice, grid, workspace, name.value


RESNET18 = (
    Conv(1, 56, 56, 64, 64),
    Conv(1, 56, 56, 64, 128, stride=2),
    Conv(1, 28, 28, 128, 128, shortcut=64),
    Conv(1, 14, 14, 256, 256),
    Conv(1, 7, 7, 512, 512, shortcut=256),
    Conv(1, 224, 224, 3, 64, kernel=7, stride=2),
)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("conv", RESNET18, ids=str)
def test_choice(library, conv, kind):
    """The chosen tile is compiled, fills the device where it can, has a name and a workspace."""
    data = draw(replace(conv, dtype=DTYPES[kind]))
    choice, grid, workspace, name = plan(library, data, kind)
    tile = TILES[choice.tile]
    assert name.decode() == f"sm80 {tile} split {choice.splits}"
    again = Choice()
    assert library.sm80_parse(name, ctypes.byref(again))
    assert (again.tile, again.splits) == (choice.tile, choice.splits)
    assert (kind, tile) not in NOT_COMPILED
    assert not (conv.shortcut and tile == "128x128")
    assert tile.startswith("any") == (conv.c == 3)
    height, width = map(int, tile.removeprefix("any").split("k")[0].split("x"))
    p, q = data.out_size()
    assert grid.tiles == -(-p * q // height) * -(-conv.k // width)
    assert grid.splits == choice.splits
    assert grid.tiles * grid.splits > 45  # the smallest has 7 * 7 pixels of 512 channels
    assert grid.shared_bytes <= 99 * 1024  # what sm_86 and sm_89 give a block
    sums = grid.tiles * grid.splits * height * width
    split = choice.splits > 1
    assert (workspace.tickets, workspace.partial_floats) == (split * grid.tiles, split * sums)


@pytest.mark.parametrize("kind", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("conv", RESNET18, ids=str)
def test_what_is_worth_measuring(library, conv, kind):
    """The chosen configuration first, then the other tiles that serve."""
    data = draw(replace(conv, dtype=DTYPES[kind]))
    names = ctypes.create_string_buffer(2000)
    problem = ctypes.byref(data.problem())
    library.sm80_ranked(problem, TYPES.index(kind), 108, names, 2000)
    ranked = names.value.decode().splitlines()
    assert ranked[0] == plan(library, data, kind)[3].decode()
    tiles = [text.split()[1] for text in ranked]
    assert len(set(tiles)) == len(tiles)
    assert set(tiles) == {
        tile
        for tile in TILES
        if tile.startswith("any") == (conv.c == 3)
        and (kind, tile) not in NOT_COMPILED
        and not (conv.shortcut and tile == "128x128")
    }


def test_names_that_are_none(library):
    for name in (b"", b"sm80", b"sm80 64x64", b"sm80 65x64 split 1", b"sm80 64x64 split 0",
                 b"sm80 64x64 split 2 ", b"sm90 64x64 split 1"):  # fmt: skip
        assert not library.sm80_parse(name, ctypes.byref(Choice()))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, ""),
        ({"n": 2**20, "h": 64}, "its indices have 31 bits, and a tensor has 4294967296 elements"),
        ({"dilation_h": 2**22}, "its taps reach further than indices of 31 bits do"),
        ({"c": 0}, "the tensor is empty"),
        ({"r": 30}, "the tensor is empty"),
    ],
)
def test_refusals(library, change, sentence):
    problem, why = draw(Conv(1, 8, 8, 8, 8)).problem(), ctypes.create_string_buffer(200)
    if "dilation_h" in change:
        problem.pad_h = change["dilation_h"] * 2
    for name, value in change.items():
        setattr(problem, name, value)
    library.sm80_refuses(ctypes.byref(problem), why, 200)
    assert why.value.decode() == sentence


def test_refused_choices(library):
    ragged = draw(Conv(1, 8, 8, 12, 64))
    assert run(library, ragged, "64x64")[1] == (
        "refused: the tile 64x64 needs channels in multiples of 8, got 12"
    )
    assert run(library, draw(Conv(1, 8, 8, 16, 64)), "64x64", splits=0)[1] == (
        "refused: splits must lie between 1 and 65535, got 0"
    )
    data = draw(Conv(1, 8, 8, 16, 64, dtype=torch.float32))
    assert run(library, data, "128x64", "float32")[1] == (
        "refused: the tile 128x64 is not compiled for float32 without TF32"
    )
    data = draw(Conv(1, 8, 8, 16, 64, shortcut=16))
    assert run(library, data, "128x128")[1] == (
        "refused: the tile 128x128 is not compiled for a shortcut"
    )
