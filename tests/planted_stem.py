"""Bugs to plant in the stem's kernel, one at a time, and the convolutions that must show each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from emulated_sm90 import Conv, alone, beyond_allowed
from emulated_stem import Stem, build, drawn, run, whole
from planting import Bug, plant, rounds

__all__ = ["BUGS", "build_planted", "cases", "rounds", "show"]

_KERNEL, _LOAD = "sm80/stem.cuh", "sm80/stem_load.cuh"
_MULTIPLY, _POOL = "sm80/stem_multiply.cuh", "sm80/stem_pool.cuh"

_WAIT, _BARRIER = "copies_wait<0>();", "__syncthreads();"
_REFILL = "load_patch(p, patch, place, thread, C::kThreads);"
_IN = "const bool in = h >= 0 && h < q.h && e >= 0 && e < line;"
_COPY_16 = "copy_16(shared_address(to), from, in)"
_TAIL = "held >= 2 ? ~0u : held == 1 ? 0xffffu : 0u"
_OUTSIDE = "conv_row < 0 || conv_row >= p.out_h || conv_column < 0 || conv_column >= p.out_w"
_MISSED = "y_row >= p.pool_h || y_column >= p.pool_w || k >= p.problem.k"

BUGS = (
    # ---- tiles and barriers ----
    Bug("no wait for the patch", _KERNEL, _WAIT, ";", "in flight", True),
    Bug(
        "no barrier before the products",
        _KERNEL,
        _BARRIER,
        ";",
        "before any write",
        True,
        _WAIT + _BARRIER,
    ),
    Bug("the wait after the barrier", _KERNEL, _WAIT + _BARRIER, _BARRIER + _WAIT, "in flight"),
    Bug(
        "no barrier before the pool",
        _KERNEL,
        _BARRIER,
        ";",
        "race",
        True,
        _BARRIER + "  // the outputs",
    ),
    Bug(
        "the next tile's place is pooled",
        _KERNEL,
        "done",
        "place",
        context="pool_stem<T, C>(p, outputs, done",
    ),
    Bug("the patch of the first tile for all", _KERNEL, _REFILL, ";", context=_REFILL + "}"),
    Bug("the next tile is the neighbour", _KERNEL, "int(gridDim.x)", "1", "twice"),
    Bug(
        "the last tile has no patch",
        _KERNEL,
        "tile < p.tiles",
        "tile < p.tiles - 1",
        context="if (tile < p.tiles)",
    ),
    Bug(
        "two warps for the same pixels",
        _KERNEL,
        "warp % C::kT.warps_m * 16 * C::kMs",
        "warp / C::kT.warps_n * 16 * C::kMs",
    ),
    Bug(
        "all channel tiles are the first",
        _KERNEL,
        "int(blockIdx.y) * kStemChannels",
        "0",
        "twice",
    ),
    Bug("tiles of the image above", _LOAD, "across - image * p.tiles_of_h", "across"),
    Bug("tiles of the row above", _LOAD, "tile - across * p.tiles_of_w", "tile"),
    # ---- the patch ----
    Bug("the row above the image", _LOAD, "h >= 0", "h >= -1", context=_IN),
    Bug("the row below the image", _LOAD, "h < q.h", "h <= q.h", context=_IN),
    Bug("a granule left of the image", _LOAD, "e >= 0", "e >= -kGranule", context=_IN),
    Bug("a granule right of the image", _LOAD, "e < line", "e <= line", "", True, _IN),
    Bug(
        "16 bytes outside are not zero",
        _LOAD,
        _COPY_16,
        "copy_16(shared_address(to), from, true)",
        ci=True,
    ),
    Bug(
        "4 bytes outside are not zero",
        _LOAD,
        "copy_4(shared_address(to), from, in)",
        "copy_4(shared_address(to), from, true)",
    ),
    Bug("an element outside is not zero", _LOAD, "in ? *from : from_float<T>(0.f)", "*from"),
    Bug(
        "4 bytes where 16 are meant",
        _LOAD,
        _COPY_16,
        "copy_4(shared_address(to), from, in)",
        "any write",
    ),
    Bug(
        "images of one channel",
        _LOAD,
        "int64_t(place.image) * q.h * line",
        "int64_t(place.image) * q.h * q.w",
    ),
    Bug("patches begin a row late", _LOAD, "(2 * place.row - 1)", "(2 * place.row)"),
    Bug("patches begin a column late", _LOAD, "(2 * place.column - 1)", "(2 * place.column)"),
    Bug("the columns' padding for rows", _LOAD, "q.pad_h", "q.pad_w"),
    Bug("the rows' padding for columns", _LOAD, "q.pad_w", "q.pad_h"),
    Bug("patches begin an element late", _LOAD, "l.lead + l.first", "l.first", "misaligned"),
    Bug(
        "the last row of the patch is left out",
        _LOAD,
        "i < l.patch_rows * granules",
        "i < (l.patch_rows - 1) * granules",
    ),
    Bug(
        "the last granule is left out",
        _LOAD,
        "i < l.patch_rows * granules",
        "i < l.patch_rows * granules - 1",
        "before any write",
    ),
    Bug(
        "the patch's pitch is a granule short",
        _LOAD,
        "row * l.pitch + element",
        "row * (l.pitch - kGranule) + element",
    ),
    # ---- the weights ----
    Bug(
        "weights before the first",
        _LOAD,
        "e >= 0",
        "e >= -1",
        "out of bounds",
        context="low = r < q.r && e >= 0",
    ),
    Bug("weights behind the last", _LOAD, "e + 1 < row", "e + 1 <= row", "out of bounds"),
    Bug(
        "weights of a row that is not there",
        _LOAD,
        "r < q.r",
        "r <= q.r",
        "out of bounds",
        context="high = r < q.r",
    ),
    Bug(
        "weights of a channel that is not there",
        _LOAD,
        "k < q.k",
        "true",
        "out of bounds",
    ),
    Bug("weights an element late", _LOAD, "word % 4 * 2 - l.lead", "word % 4 * 2"),
    Bug("weights of a window without its row", _LOAD, "r * row + e", "e"),
    Bug("weights without their pad", _LOAD, "l.weight_pitch", "(l.weight_pitch - 8)"),
    Bug("the first 32 words of weights alone", _LOAD, "word += 32", "word += 1 << 20", "any write"),
    # ---- masks and fragments ----
    Bug(
        "no mask before the window",
        _MULTIPLY,
        "p.layout.lead && word == 0 ? 0xffff0000u : ~0u",
        "~0u",
        "NaN",
        True,
    ),
    Bug(
        "no mask behind the window",
        _MULTIPLY,
        _TAIL,
        "~0u",
        "NaN",
        True,
    ),
    Bug("the mask behind the window one late", _MULTIPLY, _TAIL, "held >= 1 ? ~0u : 0u", "NaN"),
    Bug("the mask behind the window one early", _MULTIPLY, _TAIL, "held >= 2 ? ~0u : 0u"),
    Bug(
        "the mask behind the window in the wrong half",
        _MULTIPLY,
        _TAIL,
        "held >= 2 ? ~0u : held == 1 ? 0xffff0000u : 0u",
    ),
    Bug("the mask before the window in the wrong half", _MULTIPLY, "0xffff0000u", "0xffffu"),
    Bug(
        "the mask before the window in every segment",
        _MULTIPLY,
        "column_ == 0 ? head_ : ~0u",
        "head_",
    ),
    Bug(
        "the mask behind the window in every segment",
        _MULTIPLY,
        "column_ == last_ ? tail_ : ~0u",
        "tail_",
    ),
    Bug("no mask without a pair", _MULTIPLY, "(in ? ~0u : 0u)", "~0u", "NaN"),
    Bug("the last segment is left out", _MULTIPLY, "left_-- > 0", "left_-- > 1"),
    Bug(
        "a row of the patch too far",
        _MULTIPLY,
        "2 * p.layout.pitch - 16 * last_",
        "2 * p.layout.pitch",
    ),
    Bug("windows of stride 1, columns", _MULTIPLY, "p.problem.stride_w", "1"),
    Bug("windows of stride 1, rows", _MULTIPLY, "p.problem.stride_h", "1"),
    Bug(
        "windows of one channel",
        _MULTIPLY,
        "p.problem.c",
        "1",
        context="p.problem.stride_w * p.problem.c",
    ),
    Bug("windows begin with the patch", _MULTIPLY, "l.first", "0"),
    Bug(
        "pixels and segments exchanged",
        _MULTIPLY,
        "window[i][e % 2] + at[e / 2]",
        "window[i][e / 2] + at[e % 2]",
    ),
    Bug("the other segment's mask", _MULTIPLY, "mask[e / 2]", "mask[e % 2]"),
    Bug("channels 0-7 twice", _MULTIPLY, "b + 2", "b"),
    Bug("weights one segment further, not two", _MULTIPLY, "channels += 32", "channels += 16"),
    Bug(
        "weights of overlapping channels",
        _MULTIPLY,
        "j * 16 * l.weight_pitch",
        "j * 8 * l.weight_pitch",
    ),
    Bug(
        "the weights' matrices in the pixels' order",
        _MULTIPLY,
        "(lane & 7) + (lane >> 4) * 8",
        "(lane & 15)",
    ),
    # ---- activation and pool ----
    Bug("a pixel too many", _POOL, "m < C::kPixels", "m <= C::kPixels", "out of bounds"),
    Bug("sums of another channel", _POOL, "sum[i][j][2 * h + e]", "sum[i][j][h + 2 * e]"),
    Bug(
        "another channel's scale",
        _POOL,
        "channel + k + e",
        "channel + k + 1 - e",
        context="p.scale + channel + k + e",
    ),
    Bug(
        "another channel's shift",
        _POOL,
        "channel + k + e",
        "channel + k",
        context="p.shift + channel + k + e",
    ),
    Bug("always a ReLU", _POOL, "p.relu ? relu_keeping_nan(v) : v", "relu_keeping_nan(v)"),
    Bug("never a ReLU", _POOL, "p.relu ? relu_keeping_nan(v) : v", "v"),
    Bug("a ReLU that loses NaN", _POOL, "relu_keeping_nan(v)", "(v > 0.f ? v : 0.f)", "NaN"),
    Bug(
        "channels that are not there",
        _POOL,
        "channel + warp_n + 8 * j >= p.problem.k",
        "false",
        "out of bounds",
    ),
    Bug("the border counts as zero", _POOL, "minus_infinities(T())", "0u", "", True),
    Bug("the row above the map", _POOL, "conv_row < 0", "conv_row < -1", context=_OUTSIDE),
    Bug(
        "the row below the map",
        _POOL,
        "conv_row >= p.out_h",
        "conv_row > p.out_h",
        context=_OUTSIDE,
    ),
    Bug("the column left of the map", _POOL, "conv_column < 0", "false", context=_OUTSIDE),
    Bug(
        "the column right of the map",
        _POOL,
        "conv_column >= p.out_w",
        "conv_column > p.out_w",
        context=_OUTSIDE,
    ),
    Bug("an output below", _POOL, "y_row >= p.pool_h", "y_row > p.pool_h", context=_MISSED),
    Bug(
        "an output right of the map",
        _POOL,
        "y_column >= p.pool_w",
        "y_column > p.pool_w",
        context=_MISSED,
    ),
    Bug(
        "a vector of channels too many",
        _POOL,
        "k >= p.problem.k",
        "k > p.problem.k",
        "",
        False,
        _MISSED,
    ),
    Bug("the lower output is always there", _POOL, "y_row + 1 >= p.pool_h", "false"),
    Bug(
        "outputs without their pad",
        _POOL,
        "m * kOutputPitch + 8 * vector",
        "m * kStemChannels + 8 * vector",
    ),
    Bug("windows of the pool of stride 1", _POOL, "(2 * row + r)", "(row + r)"),
    Bug("two columns of the pool", _POOL, "s < 3", "s < 2"),
    Bug("two rows of the upper pool", _POOL, "greatest(0)", "greatest(1)"),
    Bug("two rows of the lower pool", _POOL, "greatest(4)", "greatest(3)"),
    Bug("the rows between are not shared", _POOL, "greatest(2)", "greatest(3)"),
)

_FLAGS = ("-w",)


def build_planted(folder: Path, bugs: Sequence[Bug]) -> ctypes.CDLL:
    with alone(folder, "plant"):
        return build(folder, plant(folder, bugs, "stem"), _FLAGS)


def cases() -> list[tuple[Stem, int, dict]]:
    """Few and small, and between them every part of the kernel."""
    stem = Conv(2, 38, 40, 3, 72, kernel=7, stride=2, relu=False)
    below = whole(stem)
    below.shift = below.shift - 200  # a zero would be the greatest
    elements = drawn(Conv(1, 35, 39, 1, 24, kernel=7, stride=2))
    word_rows = drawn(Conv(2, 13, 26, 3, 8, kernel=(5, 7), stride=(1, 2), padding=(4, 3)))
    longer = drawn(Conv(2, 11, 20, 1, 16, kernel=(3, 8), stride=2, padding=(1, 3)))
    plain = whole(Conv(2, 18, 17, 4, 24, relu=False))
    spots = drawn(Conv(4, 16, 16, 3, 64, kernel=7, stride=2))
    odd = drawn(Conv(4, 15, 13, 3, 64, kernel=5, stride=2))
    for data in (spots, odd):  # just left of a window, right of one, in one
        data.x[0, 2, 10, 6] = data.x[1, 0, 0, 9] = data.x[2, 1, 5, 6] = float("nan")
        data.x[3, 1, 7, 7], data.x[3, 0, 0, 0] = torch.inf, -torch.inf
    return [
        (below, 8, {"blocks": 2}),
        (below, 4, {"blocks": 1, "order": 1}),
        (elements, 8, {"order": 2}),
        (word_rows, 4, {"blocks": 3}),
        (longer, 8, {"order": 1}),
        (plain, 8, {"blocks": 1}),
        (spots, 8, {"order": 3}),
        (spots, 4, {}),
        (odd, 8, {}),
    ]


def show(library: ctypes.CDLL, number: int, sweep: list) -> str:
    """What shows bug `number` (0: none) first, in words; empty where nothing does."""
    library.stem_plant(number)
    for data, rows, how in sweep:
        y, report = run(library, data, rows, **how)
        if report:
            return f"{data.conv} {rows}x8: {report}"
        if difference := beyond_allowed(data, y):
            return f"{data.conv} {rows}x8: {difference}"
    return ""
