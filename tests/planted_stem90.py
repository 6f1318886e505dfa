"""Bugs to plant in the Hopper stem's kernel, one at a time, and the convolutions that must show
each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from emulated_sm90 import Conv, alone, beyond_allowed
from emulated_stem import Stem, drawn, whole
from emulated_stem90 import build, run
from planting import Bug, plant, rounds

__all__ = ["BUGS", "build_planted", "cases", "rounds", "show"]

_KERNEL, _ROWS = "sm90/stem_kernel.cuh", "sm90/stem_rows.cuh"
_MULTIPLY, _POOL, _PLAN = "sm90/stem_multiply.cuh", "sm90/stem_pool.cuh", "sm90/stem.h"

_BARRIER = "__syncthreads();"
_WINDOWS = "plain_descriptor(ring + slot * l.ring_pitch + 16 * chunk, 16, 128)"
_WEIGHTS = "plain_descriptor(weights, 16 * kStemChannels, 128)"
_IN_ROW = "const bool in = pixel >= 0 && pixel < span.pixels && channel < q.c;"
_IN_WEIGHTS = "const bool in = channel + k < q.k && s < q.s && c < q.c;"
_STORED = (
    "group < kGroups && (output > 0 || band.pair == 0) && column < p.pool_w && k < p.problem.k"
)
_MASK = "2 * (chunk + i) + lane % 4 / 2 < p.problem.s ? ~0u : 0u"
_END = "(2 * row + 1) * q.stride_h - q.pad_h + q.r"

BUGS = (
    # ---- order ----
    Bug(
        "no wait for earlier kernels",
        _KERNEL,
        "wait_for_earlier_kernels();",
        ";",
        "before griddepcontrol.wait",
        True,
    ),
    Bug("no wait for the weights", _KERNEL, "sm80::copies_wait<1>();", ";", "in flight"),
    Bug(
        "no barrier behind the weights",
        _KERNEL,
        _BARRIER,
        ";",
        "",
        False,
        _BARRIER + "  // the weights",
    ),
    Bug(
        "no barrier before a band",
        _KERNEL,
        _BARRIER,
        ";",
        "",
        True,
        _BARRIER + "  // all have expanded",
    ),
    Bug("no wait for the rows", _KERNEL, "sm80::copies_wait<0>();", ";", "in flight", True),
    Bug("no barrier in the warp", _KERNEL, "__syncwarp();", ";", "race"),
    Bug(
        "no proxy fence",
        _KERNEL,
        "async_proxy_fence();",
        ";",
        "without fence.proxy.async",
        True,
    ),
    Bug(
        "no barrier behind the rows",
        _KERNEL,
        "masked |= group_any<kStemThreads>(1, strange && p.masks);",
        "masked |= strange && p.masks;",
    ),
    Bug(
        "no barrier behind a band's first row",
        _KERNEL,
        "if (part == 0) __syncthreads();",
        ";",
        "",
        True,
    ),
    Bug("no wait for the products", _MULTIPLY, "wgmma_wait<0>();", "wgmma_wait<1>();"),
    Bug("no fence before the products", _MULTIPLY, "wgmma_fence();", ";", "wgmma.fence", True),
    Bug("products that are never committed", _MULTIPLY, "wgmma_commit();", ";"),
    # ---- bands ----
    Bug("the next band is the neighbour", _KERNEL, "int(gridDim.x)", "1", "twice"),
    Bug("all channel tiles are the first", _KERNEL, "int(blockIdx.y) * kStemChannels", "0"),
    Bug(
        "a band has its neighbour's rows",
        _KERNEL,
        "row == now.row && row > 0 ? 0 : 1",
        "1",
    ),
    Bug("a row below the map", _KERNEL, "2 * row + 1 < p.out_h", "true"),
    Bug("the lowest row is left out", _KERNEL, "2 * row + 1 < p.out_h", "2 * row + 2 < p.out_h"),
    Bug(
        "the ring's rows do not wrap", _KERNEL, "if (slot >= l.ring_rows) slot -= l.ring_rows;", ";"
    ),
    Bug(
        "the windows do not wrap",
        _KERNEL,
        "if (window >= l.ring_rows) window -= l.ring_rows;",
        ";",
    ),
    Bug("windows of stride 1", _KERNEL, "window += q.stride_h;", "window += 1;"),
    Bug(
        "the next band's rows are this one's",
        _KERNEL,
        "rows = stem_rows(p, band, band.row);",
        ";",
        context="band = stem_band(p, kN, item); rows = stem_rows(p, band, band.row); fetch_rows(p, "
        "raw, rows, warp, lane); }",
    ),
    Bug("runs of columns do not overlap", _PLAN, "columns / 2 - 1", "columns / 2"),
    Bug(
        "bands of the image above",
        _PLAN,
        "across - image * p.bands",
        "across",
    ),
    Bug(
        "a band too long",
        _PLAN,
        "row + p.rows < p.pool_h ? row + p.rows : p.pool_h",
        "row + p.rows",
    ),
    # ---- rows ----
    Bug("rows without the image's top", _ROWS, "row >= 0 && row < q.h", "row < q.h"),
    Bug("rows below the image", _ROWS, "row >= 0 && row < q.h", "row >= 0"),
    Bug("pixels left of the image", _ROWS, "rows.pixel < 0 ? 0 : rows.pixel", "rows.pixel"),
    Bug("pixels right of the image", _ROWS, "end < q.w ? end : q.w", "end"),
    Bug("a row of another image", _ROWS, "int64_t(rows.image) * q.h + row", "int64_t(row)"),
    Bug("a row too few", _ROWS, _END, _END + " - 1"),
    Bug(
        "windows begin a pixel late",
        _ROWS,
        "4 * band.pair - q.pad_w",
        "4 * band.pair - q.pad_w + 1",
    ),
    Bug("no padding above", _ROWS, "first * q.stride_h - q.pad_h", "first * q.stride_h"),
    Bug(
        "copies beyond the end of x",
        _ROWS,
        "left < 16 ? int(left) : 16",
        "16",
        "out of bounds",
        True,
    ),
    Bug("the row begins where its copy does", _ROWS, "(span.begin & 15)", "0"),
    Bug("only the first copies of a row", _ROWS, "at += 16 * 32", "at += 1 << 20"),
    Bug("zeros behind the row are not", _ROWS, "pixel < span.pixels", "true", "", False, _IN_ROW),
    Bug("zeros before the row are not", _ROWS, "pixel >= 0", "true", "", False, _IN_ROW),
    Bug("a fourth channel", _ROWS, "channel < q.c", "true", "", True, _IN_ROW),
    Bug(
        "expansion beyond the ring",
        _ROWS,
        "slot + i < l.ring_rows ? slot + i : slot + i - l.ring_rows",
        "slot + i",
    ),
    Bug("the last chunk of a row is left out", _ROWS, "at < l.positions", "at < l.positions - 1"),
    Bug(
        "a pixel's elements change places",
        _ROWS,
        "v[2 * e] | v[2 * e + 1] << 16",
        "v[2 * e + 1] | v[2 * e] << 16",
        "",
        False,
        "words.v[e] = v[2 * e] | v[2 * e + 1] << 16; carries",
    ),
    Bug("NaN is not seen", _ROWS, "carries & 0x80008000u", "false", "NaN", True),
    Bug(
        "NaN is seen in low halves only", _ROWS, "carries & 0x80008000u", "carries & 0x8000u", "NaN"
    ),
    Bug(
        "NaN is seen in high halves only",
        _ROWS,
        "carries & 0x80008000u",
        "carries & 0x80000000u",
        "NaN",
    ),
    # ---- weights ----
    Bug("weights of the first channels", _ROWS, "int64_t(2) * channel * size", "0"),
    Bug("a fourth channel's weights", _ROWS, "c < q.c", "true", "", False, _IN_WEIGHTS),
    Bug("weights behind the window", _ROWS, "s < q.s", "true", "", True, _IN_WEIGHTS),
    Bug(
        "weights of channels that are not there",
        _ROWS,
        "channel + k < q.k",
        "true",
        "",
        False,
        _IN_WEIGHTS,
    ),
    Bug("weights of another filter row", _ROWS, "(r * q.s + s) * q.c + c", "s * q.c + c"),
    # ---- products ----
    Bug(
        "the windows' leading offset is their stride",
        _MULTIPLY,
        _WINDOWS,
        _WINDOWS.replace("16, 128", "128, 16"),
        "",
        True,
    ),
    Bug(
        "windows of every second chunk", _MULTIPLY, _WINDOWS, _WINDOWS.replace("16, 128", "32, 128")
    ),
    Bug(
        "the weights' leading offset is of 32 channels",
        _MULTIPLY,
        _WEIGHTS,
        _WEIGHTS.replace("kStemChannels", "32"),
        "",
        True,
    ),
    Bug("the weights' groups overlap", _MULTIPLY, _WEIGHTS, _WEIGHTS.replace("128", "16")),
    Bug("a row's second step is its first", _MULTIPLY, "b + c", "b"),
    Bug(
        "weights one chunk further, not two",
        _MULTIPLY,
        "a += 2 * kStemChannels;",
        "a += kStemChannels;",
    ),
    Bug("sums begin with those before", _MULTIPLY, "false", "true", context="bool keep = false"),
    Bug("sums of the last step alone", _MULTIPLY, "keep = true;", ";"),
    Bug("no mask behind the window", _MULTIPLY, _MASK, "~0u", "NaN"),
    Bug("a mask too many", _MULTIPLY, _MASK, _MASK.replace("<", "+ 1 <")),
    Bug(
        "masked channels 8 to 15 twice",
        _MULTIPLY,
        "word(from + 16 * (kStemChannels + 8))",
        "word(from + 16 * kStemChannels)",
    ),
    Bug("masked windows of the first outputs", _MULTIPLY, "16 * (8 * j + chunk)", "16 * chunk"),
    # ---- pool ----
    Bug("another channel's scale", _POOL, "p.scale[channel + 8 * h]", "p.scale[channel]"),
    Bug("another channel's shift", _POOL, "p.shift[channel + 8 * h]", "p.shift[channel]"),
    Bug(
        "scales that are not there", _POOL, "channel + 8 * h < p.problem.k", "true", "out of bounds"
    ),
    Bug(
        "two rows of three",
        _POOL,
        "last ? stem_outputs<T, kN>(sum, a, j, h) : sm80::minus_infinities(T())",
        "sm80::minus_infinities(T())",
    ),
    Bug(
        "the next row has this one's maximum", _POOL, "best[j][h] = outputs;", "best[j][h] = v[h];"
    ),
    Bug("a column right of the map", _POOL, "2 * pair + 1 < p.out_w", "true", "", True),
    Bug("the left neighbour is the right one", _POOL, "(q + 3) & 3", "(q + 1) & 3"),
    Bug("no neighbour from the group before", _POOL, "q == 3 ? rights : right", "right"),
    Bug(
        "the border counts as zero",
        _POOL,
        "sm80::minus_infinities(T())",
        "0u",
        context="uint32_t rights = sm80::minus_infinities(T())",
    ),
    Bug("always a ReLU", _POOL, "p.relu", "true", context="if (p.relu)"),
    Bug("never a ReLU", _POOL, "p.relu", "false", context="if (p.relu)"),
    Bug(
        "outputs in the order of the block",
        _POOL,
        "8 * group + 4 * (r & 1) + r / 2",
        "8 * group + r",
    ),
    Bug(
        "an output right of the map",
        _POOL,
        "column < p.pool_w",
        "column <= p.pool_w",
        "",
        False,
        _STORED,
    ),
    Bug("channels that are not there", _POOL, "k < p.problem.k", "true", "", True, _STORED),
    Bug("a group that is not there", _POOL, "group < kGroups", "true", "", False, _STORED),
    Bug(
        "the lent pair is stored",
        _POOL,
        "(output > 0 || band.pair == 0)",
        "true",
        "",
        True,
        _STORED,
    ),
)

_FLAGS = ("-w",)


def build_planted(folder: Path, bugs: Sequence[Bug]) -> ctypes.CDLL:
    with alone(folder, "plant"):
        return build(folder, plant(folder, bugs, "stem90"), _FLAGS)


def cases() -> list[tuple[Stem, int, dict]]:
    """Few and small, and between them every part of the kernel."""
    below = whole(Conv(2, 38, 40, 3, 72, kernel=7, stride=2, relu=False))
    below.shift = below.shift - 200  # a zero would be the greatest
    wide = drawn(Conv(2, 9, 259, 3, 8, kernel=7, stride=2))
    elements = drawn(Conv(1, 35, 39, 1, 24, kernel=7, stride=2))
    rows = drawn(Conv(2, 23, 24, 2, 64, kernel=(3, 8), stride=(3, 2), padding=(2, 3)))
    short = drawn(Conv(3, 3, 21, 1, 8, stride=2))
    longer = drawn(Conv(1, 11, 50, 3, 16, kernel=(2, 11), stride=2, padding=(1, 5)))
    high = drawn(Conv(1, 70, 5, 3, 8, kernel=7, stride=2))
    spots = drawn(Conv(4, 16, 40, 3, 64, kernel=7, stride=2))
    odd = drawn(Conv(4, 15, 13, 3, 64, kernel=5, stride=2))
    for data in (spots, odd):  # just left of a window, right of one, in one
        data.x[0, 2, 10, 6] = data.x[1, 0, 0, 9] = data.x[2, 1, 5, 6] = float("nan")
        data.x[3, 1, 7, 7], data.x[3, 0, 0, 0] = torch.inf, -torch.inf
    return [
        (below, 112, {"rows": 3, "blocks": 2}),
        (below, 64, {"rows": 4, "blocks": 1, "order": 1}),
        (wide, 112, {"rows": 2, "order": 2}),
        (wide, 64, {"rows": 1, "blocks": 3}),
        (elements, 112, {"rows": 4, "order": 2}),
        (rows, 64, {"rows": 2, "blocks": 1, "order": 3}),
        (short, 64, {"rows": 2, "blocks": 1}),
        (longer, 64, {"rows": 2, "order": 1}),
        (high, 64, {"rows": 18}),
        (spots, 112, {"rows": 4, "order": 3}),
        (odd, 64, {"rows": 2}),
    ]


def show(library: ctypes.CDLL, number: int, sweep: list) -> str:
    """What shows bug `number` (0: none) first, in words; empty where nothing does."""
    library.stem90_plant(number)
    for data, columns, how in sweep:
        y, report = run(library, data, columns, **how)
        if report:
            return f"{data.conv} {columns}: {report}"
        if difference := beyond_allowed(data, y):
            return f"{data.conv} {columns}: {difference}"
    return ""
