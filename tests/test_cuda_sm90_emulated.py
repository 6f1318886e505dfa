"""The sm_90a kernel's own source, run on the CPU: every tile against float64, its plan, and bugs
planted in it, each of which must show.

No GPU takes part: mbarriers, TMA and wgmma are emulated to their documents (csrc/cuda/emulate).
"""

from __future__ import annotations

import ctypes
import math
import re
import statistics
from collections import Counter
from dataclasses import dataclass, replace

import planted_sm90
import pytest
import torch
from emulated_sm90 import (
    FLOAT16_TILES,
    H100,
    ROOT,
    SPLIT_TILES,
    TILES,
    Choice,
    Conv,
    Data,
    Device,
    Problem,
    Range,
    StreamEnd,
    build,
    differs,
    draw,
    run,
    why_not,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

BUILT = ROOT / "build" / "emulated"


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build(BUILT)


def agrees(library: ctypes.CDLL, data: Data, tile: str, **how) -> torch.Tensor:
    y, report = run(library, data, tile, **how)
    assert not report
    assert not differs(data, y)
    return y


def channels(tile: str, otherwise: int) -> int:
    """Input channels for which the tile is meant."""
    return 24 if tile.endswith("k32") else 16 if tile.endswith("k16") else otherwise


# ---- every tile --------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES)
def test_tiles_of_ragged_sizes(library, tile):
    """Sizes that divide nothing: rows, images, channels, chunks, the last block's share."""
    conv = Conv(3, 9, 11, channels(tile, 72), 88, residual=True)
    for order in range(3):
        agrees(library, draw(conv), tile, order=order, early=order > 0)
    agrees(library, draw(replace(conv, residual=False, relu=False)), tile, blocks=1)


@pytest.mark.parametrize("tile", SPLIT_TILES)
@pytest.mark.parametrize("splits", [2, 4, 8])
def test_split_sums_have_the_same_bits_in_any_order(library, tile, splits):
    data = draw(Conv(2, 9, 7, 72, 136, residual=True))
    results = [agrees(library, data, tile, splits=splits, order=order) for order in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("tile", "splits"), [*((tile, 1) for tile in TILES), *((tile, 4) for tile in SPLIT_TILES)]
)
def test_shortcut_of_any_scales(library, tile, splits):
    """Zero, tiny, negative on either side; a split may hold one range of the reduction or both."""
    data = draw(Conv(2, 9, 7, channels(tile, 40), 136, shortcut=72))
    for scale in (data.scale, data.shortcut_scale):
        scale[:6] = torch.tensor([0.0, 1e-6, -1e-6, -2.0, 1e-30, -1e-40])
    data.scale[8:14] = data.scale[:6].clone()
    data.shortcut_scale[8:14] = data.shortcut_scale[:6].flip(0).clone()
    agrees(library, data, tile, splits=splits, blocks=3, order=splits % 3, early=splits > 1)


@pytest.mark.parametrize("tile", ["c128x256", "c128x192", "p128x256", "p128x128"])
def test_residuals_of_some_tiles_of_a_warpgroup(library, tile):
    """Where its channels begin behind the last, there is none."""
    data = draw(Conv(3, 9, 11, 72, 136, residual=True))
    for order in range(2):
        agrees(library, data, tile, blocks=1, order=order)


@pytest.mark.parametrize("tile", FLOAT16_TILES)
def test_float16(library, tile):
    agrees(library, draw(Conv(2, 10, 9, 40, 72, dtype=torch.float16, residual=True)), tile)
    splits = 2 if tile in SPLIT_TILES else 1
    data = draw(Conv(2, 9, 7, 40, 72, shortcut=24, dtype=torch.float16))
    agrees(library, data, tile, splits=splits)


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
)


@pytest.mark.parametrize("conv", GEOMETRIES, ids=str)
@pytest.mark.parametrize("tile", ["c64x256", "p64x64"])
def test_geometries(library, tile, conv):
    agrees(library, draw(conv), tile)


def test_many_tiles_of_one_block(library):
    """Ping-pong over several laps of the ring; the last round is ragged."""
    data = draw(Conv(2, 20, 18, 16, 72))
    for order, tile in enumerate(("p128x64", "c64x256", "p64x32")):
        agrees(library, data, tile, blocks=1, order=order, early=order != 1)


# ---- overlapping launches ----------------------------------------------------------------------

NOTHING, LAUNCH, WEIGHTS = 0, 1, 3


def test_weights_are_loaded_early_behind_a_captured_launch_alone(library):
    """Of what precedes a launch on a stream that runs, nothing is known."""
    none, output, weights = Range(0, 0), Range(1000, 2000), Range(3000, 4000)

    def allowed(end, weights=weights, shortcut=none):
        return library.sm90_overlap(*map(ctypes.byref, (end, weights, shortcut)))

    runs, here = StreamEnd(True, 0, None), StreamEnd(False, 7, 0x5550)
    assert allowed(runs) == LAUNCH
    assert allowed(here) == NOTHING  # a node of somebody else
    library.sm90_launched(ctypes.byref(runs), ctypes.byref(output))
    assert allowed(runs) == LAUNCH
    library.sm90_launched(ctypes.byref(here), ctypes.byref(output))
    assert allowed(here) == allowed(here) == WEIGHTS  # two branches may follow
    assert allowed(here, weights=Range(2000, 3000)) == WEIGHTS
    assert allowed(here, weights=Range(1996, 3000)) == LAUNCH
    assert allowed(here, weights=Range(0, 1001)) == LAUNCH
    assert allowed(here, shortcut=Range(1500, 1501)) == LAUNCH
    assert allowed(StreamEnd(False, 8, 0x5550)) == NOTHING  # another capture's node
    assert allowed(StreamEnd(False, 7, 0x5560)) == NOTHING  # a copy came between
    assert allowed(StreamEnd(False, 7, None)) == NOTHING  # several nodes did, or none
    assert allowed(StreamEnd(False, 0, None)) == NOTHING  # where CUDA did not answer


def test_a_captured_launch_that_was_forgotten(library):
    first, second = StreamEnd(False, 9, 0x10000), StreamEnd(False, 9, 0x10000 + 64 * 16)
    none, output = Range(0, 0), Range(1000, 2000)
    for end in (first, second):
        library.sm90_launched(ctypes.byref(end), ctypes.byref(output))
    ranges = [ctypes.byref(none)] * 2
    assert library.sm90_overlap(ctypes.byref(first), *ranges) == NOTHING
    assert library.sm90_overlap(ctypes.byref(second), *ranges) == WEIGHTS


# ---- tap-shift ---------------------------------------------------------------------------------

WINDOWS = [  # rows, images, positions
    (Conv(5, 7, 7, 64, 136, residual=True), (7, 4, 256)),
    (Conv(3, 13, 11, 64, 72, residual=True), (9, 1, 216)),
    (Conv(3, 13, 11, 64, 72), (9, 1, 208)),
    (Conv(3, 13, 11, 64, 64, residual=True), (9, 1, 232)),
    (Conv(2, 13, 11, 64, 64, shortcut=64), (9, 1, 216)),
    (Conv(2, 13, 11, 64, 72, residual=True), (9, 1, 232)),
    (Conv(3, 13, 11, 128, 72, shortcut=64), (9, 1, 216)),
    (Conv(5, 7, 7, 64, 136, shortcut=128), (7, 4, 256)),
    (Conv(2, 12, 12, 64, 64, dilation=2, relu=False), (6, 1, 232)),
    (Conv(2, 9, 9, 64, 64, kernel=1), (0, 0, 0)),
    (Conv(1, 10, 12, 64, 64, kernel=(5, 3)), (0, 0, 0)),
    (Conv(1, 28, 28, 64, 136), (0, 0, 0)),
    (Conv(4, 7, 7, 128, 64, shortcut=64), (0, 0, 0)),
]


@pytest.mark.parametrize("row", range(len(WINDOWS)))
def test_tap_shift(library, row):
    conv, window = WINDOWS[row]
    order = row % 3
    agrees(library, draw(conv), "tap-shift", window=window, order=order, blocks=1 + order)


def test_tap_shift_has_a_name(library):
    choice = Choice()
    assert library.sm90_parse(b"sm90 tap-shift split 1", ctypes.byref(choice))
    assert choice.tile == library.sm90_tile_count()


TAP_SHIFT_REFUSED = [
    (Conv(1, 8, 8, 64, 64, stride=2), "tap-shift serves stride 1"),
    (Conv(1, 8, 8, 64, 64, padding=0), "tap-shift serves outputs of the input's size"),
    (Conv(1, 8, 8, 72, 64), "tap-shift needs input channels in multiples of 64"),
    (Conv(1, 4, 256, 64, 64), "tap-shift's rows hold 256 positions, 128 with a shortcut"),
    (Conv(1, 8, 8, 64, 64, shortcut=64, shortcut_stride=1),
     "tap-shift serves shortcuts of stride 2"),
]  # fmt: skip


@pytest.mark.parametrize(("conv", "sentence"), TAP_SHIFT_REFUSED)
def test_tap_shift_refusals(library, conv, sentence):
    assert run(library, draw(conv), "tap-shift")[1] == f"refused: {sentence}"


# ---- what is not finite ------------------------------------------------------------------------


@pytest.mark.parametrize("tile", ["c128x256", "p128x128"])
def test_nan_and_inf_reach_the_outputs_that_eager_gives_them_to(library, tile):
    data = draw(Conv(2, 8, 8, 40, 64, shortcut=24))
    data.x[0, 3, 2, 2] = float("nan")
    data.x[1, 3, 2, 2] = torch.inf
    data.shortcut_x[0, 5, 8, 8] = torch.inf
    data.shortcut_scale[::4] = 0  # 0 * Inf is NaN, as in eager PyTorch
    agrees(library, data, tile)


# ---- the plan ----------------------------------------------------------------------------------

RESNET18 = (
    Conv(1, 56, 56, 64, 64),
    Conv(1, 56, 56, 64, 128, stride=2),
    Conv(1, 28, 28, 128, 128, shortcut=64),
    Conv(1, 14, 14, 256, 256),
    Conv(1, 7, 7, 512, 512, shortcut=256),
)


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("conv", RESNET18, ids=str)
def test_choice(library, conv, batch):
    """The chosen tile serves the convolution, fills the device where it can, and has a name."""
    problem = draw(conv).problem()
    problem.n = batch
    choice, again, blocks, us = Choice(), Choice(), ctypes.c_int(), ctypes.c_double()
    name = ctypes.create_string_buffer(80)
    library.sm90_choose(*map(ctypes.byref, (problem, H100, choice, blocks, us)), name, 80)
    tile = (*TILES, "tap-shift")[choice.tile]
    assert name.value.decode() == f"sm90 {tile} split {choice.splits}"
    assert library.sm90_parse(name.value, ctypes.byref(again))
    assert (again.tile, again.splits) == (choice.tile, choice.splits)
    per_sm = 2 if tile != "tap-shift" and library.sm90_tile_threads(choice.tile) == 256 else 1
    assert 0 < blocks.value <= 132 * per_sm
    assert us.value > 0
    if batch == 1:
        assert blocks.value > 45  # of 4 to 49 tiles of 128 x 64
    assert choice.splits in (1, 2, 4, 8)
    assert choice.splits == 1 or tile in SPLIT_TILES


@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("conv", RESNET18, ids=str)
def test_what_is_worth_measuring(library, conv, batch):
    """The chosen configuration first, then other tiles, and tap-shift where it serves."""
    problem = draw(conv).problem()
    problem.n = batch
    found = ranked(library, problem)
    assert ("sm90 tap-shift split 1" in found) == (conv.stride == 1)
    choice, blocks, us = Choice(), ctypes.c_int(), ctypes.c_double()
    name = ctypes.create_string_buffer(80)
    library.sm90_choose(*map(ctypes.byref, (problem, H100, choice, blocks, us)), name, 80)
    assert found[0] == name.value.decode()
    tiles = [text.split()[1] for text in found]
    assert len(set(tiles)) == len(tiles) > 3
    assert all(library.sm90_parse(text.encode(), ctypes.byref(choice)) for text in found)


LAYER = re.compile(r"(\w+) (\d+) (\d+) (\d)x\d(?:/(\d))? (\d+)>(\d+) (\d+)( \+res)? \| (.*)")


@dataclass(frozen=True)
class Timed:
    """A convolution and what an H100 took for it: microseconds by configuration."""

    net: tuple[str, int]  # and the batch
    count: int  # in the net
    problem: Problem
    residual: bool
    times: dict[str, float]


def timed() -> list[Timed]:
    found = []
    for line in (ROOT / "tests" / "sm90_times.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        net, *numbers, residual, times = LAYER.fullmatch(line).groups()
        n, count, kernel, stride, c, k, size = (int(number or 1) for number in numbers)
        data = draw(Conv(1, 1, 1, 8, 8, kernel=kernel, stride=stride))
        problem = data.problem()
        problem.n, problem.h, problem.w, problem.c, problem.k = n, size, size, c, k
        words = times.split()
        texts = ("sm90 " + " split ".join((*word.split("/"), "1")[:2]) for word in words[::2])
        us = dict(zip(texts, map(float, words[1::2]), strict=True))
        found.append(Timed((net, n), count, problem, residual is not None, us))
    return found


def ranked(library, problem: Problem, device: Device = H100) -> list[str]:
    names = ctypes.create_string_buffer(2000)
    library.sm90_ranked(ctypes.byref(problem), ctypes.byref(device), names, 2000)
    return names.value.decode().splitlines()


def chosen(library, problem: Problem, device: Device) -> str:
    name = ctypes.create_string_buffer(80)
    out = Choice(), ctypes.c_int(), ctypes.c_double()
    library.sm90_choose(*map(ctypes.byref, (problem, device, *out)), name, 80)
    return name.value.decode()


@pytest.mark.parametrize("largest", [1, 2, 4])
def test_no_cluster_is_larger_than_the_device_holds(library, largest):
    """Each tile with the best number of splits that fits, the whole GPU's where that does."""
    device, too_large = Device(132, largest), Counter()
    deep = draw(Conv(1, 7, 7, 2048, 64)).problem()  # in eight splits; ResNet's have fewer
    for problem in (deep, *(one.problem for one in timed())):
        whole, found = ranked(library, problem), ranked(library, problem, device)
        assert all(int(text.split()[-1]) <= largest for text in found)
        fits = [text for text in whole if int(text.split()[-1]) <= largest]
        assert [text for text in found if text in fits] == fits
        assert {text.split()[1] for text in found} == {text.split()[1] for text in whole}
        # In turns: what is remembered of one device is not another's.
        for asked, best in ((H100, whole[0]), (device, found[0]), (H100, whole[0])):
            assert chosen(library, problem, asked) == best
        too_large["ranked"] += len(whole) - len(fits)
        too_large["chosen"] += whole[0] not in fits
    assert min(too_large["ranked"], too_large["chosen"]) > 0


def test_choices_are_near_the_best_that_was_measured(library):
    """Within 10% for every layer, 1.5% over a net, though no choice knows of a residual."""
    chosen, best = Counter(), Counter()
    for one in timed():
        choice = ranked(library, one.problem)[0]
        least = min(one.times.values())
        assert one.times[choice] <= 1.1 * least, (one.net, choice, one.times)
        chosen[one.net] += one.count * one.times[choice]
        best[one.net] += one.count * least
    assert len(best) == 6
    for net, least in best.items():
        assert chosen[net] <= 1.015 * least, net


def test_modelled_times_are_near_those_measured(library):
    """Without a residual, of configurations up to half slower than the best."""
    ratios = []
    choice = Choice()
    for one in timed():
        most = 1.5 * min(one.times.values())
        for text, took in one.times.items():
            if not one.residual and took <= most:
                assert library.sm90_parse(text.encode(), ctypes.byref(choice))
                us = library.sm90_cost(
                    ctypes.byref(one.problem), ctypes.byref(choice), ctypes.byref(H100)
                )
                ratios.append(math.log(us / took))
    assert abs(statistics.mean(ratios)) < 0.02
    assert statistics.pstdev(ratios) < 0.12
    assert max(map(abs, ratios)) < 0.4


@pytest.mark.parametrize(
    ("channels", "size", "wins"), [(64, 56, (8, 32, 128)), (128, 28, (32, 128)), (512, 7, ())]
)
def test_tap_shift_is_chosen_where_it_won(library, channels, size, wins):
    problem = draw(Conv(1, size, size, channels, channels)).problem()
    for problem.n in (1, 8, 32, 128):
        won = ranked(library, problem)[0] == "sm90 tap-shift split 1"
        assert won == (problem.n in wins), problem.n


def test_names_that_are_none(library):
    for name in (b"", b"sm90", b"sm90 p64x64", b"sm90 p65x64 split 1", b"sm90 p64x64 split 0",
                 b"sm90 p64x64 split 2 ", b"sm80 p64x64 split 1"):  # fmt: skip
        assert not library.sm90_parse(name, ctypes.byref(Choice()))


REFUSED = (
    (Conv(1, 8, 8, 16, 16, groups=2), "its kernel has no groups"),
    (Conv(1, 8, 8, 12, 64), "TMA needs input channels in multiples of 8, not 12"),
    (Conv(1, 8, 8, 16, 20), "16-byte stores need output channels in multiples of 8, not 20"),
    (Conv(1, 40, 40, 8, 8, stride=9), "TMA walks in strides up to 8, not 9"),
    (Conv(1, 300, 8, 8, 8, dilation=(128, 1), padding=(0, 1)),
     "TMA's tap offsets reach 255 pixels, not 256"),
    (Conv(1, 200, 8, 8, 8, kernel=(2, 1), dilation=(130, 1), padding=0),
     "TMA's corners allow a reach of 128 pixels beyond the padding, not 130"),
    (Conv(1, 8, 8, 8, 8, padding=128), "TMA's corners allow a padding up to 127, not 128"),
)  # fmt: skip


@pytest.mark.parametrize(("conv", "sentence"), REFUSED)
def test_refusals(library, conv, sentence):
    why = ctypes.create_string_buffer(200)
    library.sm90_refuses(ctypes.byref(draw(conv).problem()), why, 200)
    assert why.value.decode() == sentence
    assert run(library, draw(conv), "p64x64")[1] == f"refused: {sentence}"


SPLITS_REFUSED = [  # tile, splits, the device's largest cluster
    ("p128x64", 2, 8, "the tile p128x64 does not split the reduction"),
    ("p64x64", 3, 8, "a cluster has 2, 4 or 8 splits, not 3"),
    ("p64x64", 16, 8, "a cluster has 2, 4 or 8 splits, not 16"),
    ("p64x64", 4, 8, "the reduction has 2 steps to split, not 4"),
    ("tap-shift", 2, 8, "tap-shift does not split the reduction"),
    ("p64x64", 8, 4, "a cluster of 8 blocks does not fit this device: its limit is 4"),
    ("p64x64", 4, 2, "a cluster of 4 blocks does not fit this device: its limit is 2"),
    ("p64x64", 2, 1, "a cluster of 2 blocks does not fit this device: its limit is 1"),
    ("p64x64", 2, 2, ""),
    ("p64x64", 1, 1, ""),
    ("tap-shift", 1, 1, ""),
]


@pytest.mark.parametrize(("tile", "splits", "largest", "sentence"), SPLITS_REFUSED)
def test_refused_splits(library, tile, splits, largest, sentence):
    why = ctypes.create_string_buffer(200)
    choice = Choice(TILES.index(tile) if tile in TILES else len(TILES), splits)
    problem = draw(Conv(1, 8, 8, 128, 64, kernel=1)).problem()
    device = Device(132, largest)
    library.sm90_refuses_choice(*map(ctypes.byref, (problem, choice, device)), why, 200)
    assert why.value.decode() == sentence


# ---- planted bugs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """Libraries of planted bugs, and where each bug is."""
    where = {}
    for bugs in planted_sm90.rounds([bug for bug in planted_sm90.BUGS if bug.ci]):
        built = planted_sm90.build_planted(BUILT, bugs)
        where.update({bug.name: (built, number + 1) for number, bug in enumerate(bugs)})
    return where, planted_sm90.cases()


@pytest.mark.parametrize(
    "bug", [bug for bug in planted_sm90.BUGS if bug.ci], ids=lambda bug: bug.name
)
def test_planted_bug_shows(planted, bug):
    where, cases = planted
    shown = planted_sm90.show(*where[bug.name], cases, bug)
    assert shown
    assert bug.report in shown


def test_without_a_planted_bug_nothing_shows(planted):
    where, cases = planted
    for built in {id(built): built for built, _ in where.values()}.values():
        assert not planted_sm90.show(built, 0, cases)
