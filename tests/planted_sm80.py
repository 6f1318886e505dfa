"""Bugs to plant in the sm_80 kernel, one at a time, and the convolutions that must show each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from emulated_sm80 import Conv, Data, build, draw, run, wrong
from emulated_sm90 import alone
from planting import Bug, plant, rounds

__all__ = ["BUGS", "build_planted", "cases", "rounds", "show"]

_KERNEL, _LOAD, _EPILOGUE = "sm80/conv_kernel.cuh", "sm80/loader.cuh", "sm80/epilogue.cuh"
_RING = "sm80/main_loop.cuh"
_SUM = "split_sum.cuh"
_SPLIT, _CONFIG, _TILES = "sm80/split_k.cuh", "sm80/config.cuh", "sm80/tiles.h"
_SHORTCUT, _MULTIPLY = "sm80/shortcut.cuh", "sm80/multiplier.cuh"
_JOINT = "joint_scale.cuh"

_WAIT = "copies_wait<C::kStages - 2>();"
_BARRIER = "__syncthreads();"
_FENCE = "__threadfence();"
_RESCALE = "rescale<C>(sum, p, channel + multiplier.warp_n, channel_end, multiplier.lane);"
_ROWS = "C::kRows * C::kRowBytes"

BUGS = (
    # ---- the ring ----
    Bug("no barrier in the main loop", _RING, _BARRIER, ";", "race", True, _WAIT + _BARRIER),
    Bug(
        "the wait is for one group too few",
        _RING,
        _WAIT,
        "copies_wait<C::kStages - 1>();",
        "in flight",
        True,
    ),
    Bug("no wait", _RING, _WAIT, ";", "in flight"),
    Bug("the wait after the barrier", _RING, _WAIT + _BARRIER, _BARRIER + _WAIT, "in flight"),
    Bug(
        "a stage refilled that is being read",
        _RING,
        "C::kStages - 1",
        "C::kStages - 2",
        context="free_stage = (first + C::kStages - 1)",
    ),
    Bug(
        "the refill wraps one late",
        _RING,
        "free_stage + 1 == C::kStages ? 0 : free_stage + 1",
        "free_stage == C::kStages ? 0 : free_stage + 1",
    ),
    Bug(
        "the reads wrap one early",
        _RING,
        "stage + 1 == C::kStages ? 0 : stage + 1",
        "stage + 2 == C::kStages ? 0 : stage + 1",
        context="} stage = stage + 1 == C::kStages ? 0 : stage + 1",
    ),
    Bug(
        "a group only where something was copied",
        _KERNEL,
        "copies_commit();",
        "if (step < end) copies_commit();",
        "in flight",
    ),
    Bug("no groups", _KERNEL, "copies_commit();", ";", "in flight"),
    Bug(
        "no barrier before the epilogue",
        _KERNEL,
        _BARRIER,
        ";",
        "race",
        context="copies_wait<0>();" + _BARRIER,
    ),
    Bug(
        "the last step left out",
        _RING,
        "step < end",
        "step < end - 1",
        context="step < end; ++step",
    ),
    Bug(
        "the refill one step ahead",
        _RING,
        "load(step + C::kStages - 1, free_stage);",
        "load(step + C::kStages, free_stage);",
        context="multiplier.fetch(stage, 0, 0); load(step + C::kStages - 1, free_stage);",
    ),
    # ---- fragments ----
    Bug(
        "the next part's fragments are this part's",
        _RING,
        "if (i + 1 < C::kChunks / 2) multiplier.fetch(stage, i + 1, (i + 1) & 1);",
        "if (i + 1 < C::kChunks / 2) multiplier.fetch(stage, i, (i + 1) & 1);",
    ),
    Bug(
        "the other buffer is multiplied",
        _RING,
        "i & 1",
        "(i + 1) & 1",
        context="multiplier.products(sum, i & 1)",
    ),
    Bug(
        "half a warp reads fragments",
        _RING,
        "if (i + 1 < C::kChunks / 2) multiplier.fetch(stage, i + 1, (i + 1) & 1);",
        "if (i + 1 < C::kChunks / 2 && (threadIdx.x & 31) < 16)"
        " multiplier.fetch(stage, i + 1, (i + 1) & 1);",
        "divergent",
    ),
    Bug(
        "the part added where it should be exchanged, pixels",
        _MULTIPLY,
        "pixel_part ^ (step << 5)",
        "pixel_part + (step << 5)",
    ),
    Bug(
        "the part added where it should be exchanged, channels",
        _MULTIPLY,
        "channel_part ^ (step << 5)",
        "channel_part + (step << 5)",
    ),
    Bug(
        "pixels read without the swizzle",
        _MULTIPLY,
        "C::swizzle(warp_m + (lane & 15), lane >> 4)",
        "(warp_m + (lane & 15)) * C::kRowBytes + (lane >> 4) * 16",
        ci=True,
    ),
    Bug(
        "channels read without the swizzle",
        _MULTIPLY,
        "C::swizzle(channel + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1)",
        "(channel + (lane & 7) + (lane >> 4) * 8) * C::kRowBytes + (lane >> 3 & 1) * 16",
    ),
    Bug(
        "the pixels' matrices in the channels' order",
        _MULTIPLY,
        "C::swizzle(warp_m + (lane & 15), lane >> 4)",
        "C::swizzle(warp_m + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1)",
    ),
    Bug(
        "the channels' matrices in the pixels' order",
        _MULTIPLY,
        "C::swizzle(channel + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1)",
        "C::swizzle(channel + (lane & 15), lane >> 4)",
    ),
    Bug(
        "channels 8-15 before channels 0-7",
        _MULTIPLY,
        "&b[half][j / 2][j % 2 * 2]",
        "&b[half][j / 2][2 - j % 2 * 2]",
    ),
    Bug(
        "warps in the wrong rows",
        _MULTIPLY,
        "(tid >> 5) % C::kWarpsM * C::kWarpM",
        "(tid >> 5) / C::kWarpsM * C::kWarpM",
    ),
    Bug("cut to TF32, not rounded", _MULTIPLY, "round_to_tf32(r[i])", "r[i]"),
    Bug(
        "FMA: rows of another warp's product",
        _MULTIPLY,
        "warp_m + 16 * i + 8 * h + lane / 4",
        "warp_m + 8 * i + 16 * h + lane / 4",
    ),
    Bug(
        "FMA: channels of another lane",
        _MULTIPLY,
        "warp_n + 8 * j + lane % 4 * 2 + e",
        "warp_n + 8 * j + lane % 4 + 4 * e",
    ),
    Bug(
        "FMA: a chunk read without the swizzle",
        _MULTIPLY,
        "C::swizzle(warp_n + 8 * j + lane % 4 * 2 + e, chunk)",
        "(warp_n + 8 * j + lane % 4 * 2 + e) * C::kRowBytes + chunk * 16",
    ),
    Bug("FMA: the last chunk left out", _MULTIPLY, "chunk < C::kChunks", "chunk < C::kChunks - 1"),
    Bug(
        "FMA: sums of the other channel",
        _MULTIPLY,
        "2 * h + e",
        "h + 2 * e",
        context="fmaf(pixels[i][h].v[d], channel.v[d], sum[i][j][2 * h + e])",
    ),
    Bug(
        "no swizzle on either side",
        _CONFIG,
        "(chunk ^ (kChunks == 4 ? (row >> 1) & 3 : row & 7))",
        "chunk",
        "bank conflicts",
    ),
    Bug(
        "a swizzle by the wrong bits of the row",
        _CONFIG,
        "(row >> 1) & 3",
        "row & 3",
        "bank conflicts",
    ),
    # ---- the ranges of the reduction ----
    Bug(
        "no rescaling between the ranges",
        _KERNEL,
        _RESCALE,
        ";",
        context="step > begin)" + _RESCALE,
    ),
    Bug(
        "no rescaling of a split without shortcut",
        _KERNEL,
        _RESCALE,
        ";",
        context="end <= main_steps)" + _RESCALE,
    ),
    Bug(
        "rescaled one step late",
        _KERNEL,
        "step == main_steps",
        "step == main_steps + 1",
        context="step == main_steps && step > begin)" + _RESCALE,
    ),
    Bug(
        "a split that ends where the shortcut begins",
        _KERNEL,
        "end <= main_steps",
        "end < main_steps",
    ),
    Bug("rescaled twice", _KERNEL, "end <= main_steps", "true"),
    Bug(
        "the ratio of another channel",
        _SHORTCUT,
        "8 * j + lane % 4 * 2 + e",
        "8 * j + lane % 4 + e",
    ),
    Bug(
        "the ratio of the other channel",
        _SHORTCUT,
        "sum[i][j][2 + e] *= ratio;",
        "sum[i][j][3 - e] *= ratio;",
    ),
    Bug(
        "the shortcut begins one step late",
        _KERNEL,
        "step == main_steps",
        "step == main_steps + 1",
        context="step == main_steps && step > begin) loader",
    ),
    Bug(
        "a split starts at the shortcut's first step",
        _KERNEL,
        "begin - main_steps",
        "0",
        context="loader.open(true, begin - main_steps)",
    ),
    Bug(
        "a split that starts in the shortcut starts in the main range",
        _KERNEL,
        "kShortcut && begin >= main_steps",
        "false",
    ),
    Bug(
        "the shortcut has the main range's length",
        _LOAD,
        "length = c_count = pitch = q.shortcut_c;",
        "c_count = pitch = q.shortcut_c;",
    ),
    Bug(
        "the shortcut without its stride",
        _LOAD,
        "q.shortcut_stride_h",
        "1",
        context="stride_h = q.shortcut_stride_h",
    ),
    Bug("the shortcut's image as wide as the main one", _LOAD, "q.shortcut_w", "q.w"),
    Bug("dead channels kept", _LOAD, "!(kShortcut && shortcut && joint_scale(p, n).dead)", "true"),
    Bug(
        "another channel declared dead",
        _LOAD,
        "joint_scale(p, n).dead",
        "joint_scale(p, n ^ 1).dead",
    ),
    Bug("zero is no dead scale", _JOINT, "shortcut_scale == 0.f", "false"),
    Bug(
        "tiny scales are not dead", _JOINT, "fabsf(shortcut_scale) * kRange < fabsf(scale)", "false"
    ),
    Bug(
        "dead channels keep their factor",
        _JOINT,
        "return {scale, 1.f, true};",
        "return {scale, shortcut_scale, true};",
    ),
    Bug("the ratio upside down", _JOINT, "scale / shortcut_scale", "shortcut_scale / scale"),
    # ---- from global to shared memory ----
    Bug("rows one past the last pixel loaded", _LOAD, "m < pixels", "m <= pixels", "out of bounds"),
    Bug(
        "a step one past the last channel loaded",
        _LOAD,
        "k < length",
        "k <= length",
        context="has = k < length",
    ),
    Bug(
        "no zeros where a tap is outside",
        _LOAD,
        f"copy_16(shared_0 + to + i * ({_ROWS}), tap[i] + offset, has && inside(i, dh, dw));",
        "if (has && inside(i, dh, dw))"
        f" copy_16(shared_0 + to + i * ({_ROWS}), tap[i] + offset, true);",
        ci=True,
    ),
    Bug(
        "taps outside read",
        _LOAD,
        f"copy_16(shared_0 + to + i * ({_ROWS}), tap[i] + offset, has && inside(i, dh, dw));",
        f"copy_16(shared_0 + to + i * ({_ROWS}), tap[i] + offset, has);",
    ),
    Bug(
        "weights behind the last filter read",
        _LOAD,
        "has && (live >> i & 1)",
        "has",
        "out of bounds",
    ),
    Bug(
        "the row below the image is inside",
        _LOAD,
        "unsigned(at_h[i] + down) < unsigned(height)",
        "unsigned(at_h[i] + down) <= unsigned(height)",
    ),
    Bug(
        "the column right of the image is inside",
        _LOAD,
        "unsigned(at_w[i] + right) < unsigned(width)",
        "unsigned(at_w[i] + right) <= unsigned(width)",
    ),
    Bug(
        "rows above the image are inside",
        _LOAD,
        "unsigned(at_h[i] + down) < unsigned(height)",
        "at_h[i] + down < height && at_h[i] > -99",
    ),
    Bug("strides exchanged", _LOAD, "q.stride_h", "q.stride_w"),
    Bug("paddings exchanged", _LOAD, "q.pad_w", "q.pad_h"),
    Bug("the column's dilation forgotten", _LOAD, "dw += step_w();", "dw += 1;"),
    Bug("the row's dilation forgotten", _LOAD, "dh += step_h();", "dh += 1;"),
    Bug(
        "a tap's step without the other groups",
        _LOAD,
        "offset += step_w() * pitch - c_count;",
        "offset += (step_w() - 1) * c_count;",
    ),
    Bug(
        "a filter row's step without dilation",
        _LOAD,
        "step_h() * width - s_count() * step_w()",
        "step_h() * width - s_count()",
    ),
    Bug("the next tap one channel late", _LOAD, "c >= c_count", "c > c_count"),
    Bug(
        "one tap too many in a filter's row",
        _LOAD,
        "++s == s_count()",
        "++s > s_count()",
        context="if (++s == s_count()) {\n        s = dw = 0;",
    ),
    Bug("every group reads the first's channels", _LOAD, "x += group * c_count;", ";"),
    Bug("every chunk starts at a tap's first channel", _LOAD, "c = k - taps * c_count;", "c = 0;"),
    Bug(
        "every split starts in a filter's first column",
        _LOAD,
        "s = taps - r * s_count();",
        "s = 0;",
    ),
    Bug("dilation forgotten where a split starts", _LOAD, "dw = s * step_w();", "dw = s;"),
    Bug("the next tap one element late", _LOAD, "++cc == c_count", "++cc > c_count"),
    Bug("elements: dilation forgotten", _LOAD, "right += step_w();", "right += 1;"),
    Bug("elements: one tap too many", _LOAD, "++ss == s_count()", "++ss > s_count()"),
    Bug(
        "elements behind the last weight read",
        _LOAD,
        "(live >> i & 1) && k + j < length",
        "(live >> i & 1)",
        "out of bounds",
    ),
    Bug(
        "elements beside the image read",
        _LOAD,
        "k + j < length && inside(i, down, right)",
        "k + j < length && at_h[i] >= -99 && at_h[i] + down < height",
    ),
    Bug(
        "steps rounded down",
        _TILES,
        "ceil_div(p.r * p.s * group_in(p), step)",
        "p.r * p.s * group_in(p) / step",
    ),
    Bug(
        "the first channel tile of every group",
        _KERNEL,
        "channel_tile - group * tiles_per_group",
        "channel_tile",
    ),
    Bug(
        "every group writes the first's channels",
        _KERNEL,
        "group * per_group",
        "0",
        context="channel = group * per_group",
    ),
    Bug("a group ends with the tensor", _KERNEL, "(group + 1) * per_group", "p.problem.k"),
    Bug(
        "the splits' ends one step early",
        _KERNEL,
        "int64_t(p.schedule.steps) * (split + 1) / p.schedule.splits",
        "int64_t(p.schedule.steps) * (split + 1) / p.schedule.splits - 1",
    ),
    # ---- the epilogue ----
    Bug(
        "a patch written before it was read",
        _EPILOGUE,
        "__syncwarp();",
        ";",
        "race",
        context="{\n    __syncwarp();\n#pragma unroll\n    for (int j = 0; j < C::kNs",
    ),
    Bug(
        "a patch read before it was written",
        _EPILOGUE,
        "__syncwarp();",
        ";",
        context="sum[i][j][2 * h + 1]);\n    __syncwarp();",
    ),
    Bug("patches overlap", _KERNEL, "warp * 16 * C::kPitch", "warp * 15 * C::kPitch", "race"),
    Bug(
        "a row one past the last pixel stored",
        _EPILOGUE,
        "m >= pixels",
        "m > pixels",
        "out of bounds",
        ci=True,
    ),
    Bug("channels behind the last stored", _EPILOGUE, "valid <= 0", "false"),
    Bug(
        "the ReLU swallows NaN",
        _EPILOGUE,
        "relu_keeping_nan(v)",
        "(v > 0.f ? v : 0.f)",
        ci=True,
    ),
    Bug("no residual", _EPILOGUE, "if (p.residual) v += to_float(other.v[e]);", ";"),
    Bug("rows of a product exchanged", _EPILOGUE, "lane / 4 + 8 * h", "lane / 4 * 2 + h"),
    Bug("columns of a product exchanged", _EPILOGUE, "lane % 4 * 2", "(lane + 1) % 4 * 2"),
    Bug(
        "the shortcut's shift forgotten",
        _SHORTCUT,
        "__ldg(p.shift + channel) + __ldg(p.shortcut_shift + channel)",
        "__ldg(p.shift + channel)",
    ),
    Bug(
        "dead channels multiplied by the shortcut's scale",
        _SHORTCUT,
        "joint_scale(p, channel).factor",
        "__ldg(p.shortcut_scale + channel)",
    ),
    Bug(
        "16-byte stores of ragged rows",
        _EPILOGUE,
        "(K | channel | channel_end) % C::kElements == 0",
        "true",
        "misaligned",
    ),
    Bug(
        "the end of a group ignored by 16-byte stores",
        _EPILOGUE,
        "(K | channel | channel_end)",
        "(K | channel)",
    ),
    Bug(
        "an element too many stored",
        _EPILOGUE,
        "e < valid",
        "e <= valid",
        context="e < valid; ++e) y[e]",
    ),
    Bug(
        "a residual element too many read",
        _EPILOGUE,
        "e < valid",
        "true",
        "out of bounds",
        context="e < valid; ++e) other.v[e]",
    ),
    # ---- split-K ----
    Bug(
        "no barrier before the ticket",
        _SPLIT,
        _BARRIER,
        ";",
        "without barrier",
        context=_BARRIER + "\n  if (tid == 0) {\n    __threadfence();",
    ),
    Bug(
        "no fence before the ticket",
        _SPLIT,
        _FENCE,
        ";",
        "without barrier, or fence",
        True,
        _FENCE + "  // what the barrier collected",
    ),
    Bug(
        "no fence after the ticket",
        _SPLIT,
        _FENCE,
        ";",
        "without barrier, or fence",
        True,
        _FENCE + "  // the other splits",
    ),
    Bug(
        "no barrier behind the ticket",
        _SPLIT,
        _BARRIER,
        ";",
        context="after the ticket\n  }\n" + _BARRIER,
    ),
    Bug("the last but one adds", _SPLIT, "p.schedule.splits - 1", "p.schedule.splits - 2"),
    Bug("all tiles' sums in one place", _SPLIT, "s * tiles + tile", "s * tiles"),
    Bug("tickets left", _SPLIT, "p.tickets[tile] = 0;", ";", "not reset"),
    Bug("one ticket for all tiles", _SPLIT, "p.tickets + tile", "p.tickets"),
    Bug("the last split left out", _SUM, "split + s < splits", "split + s < splits - 1"),
    Bug("a split too many", _SUM, "split + s < splits", "split + s <= splits"),
    Bug(
        "all of a round's loads from its first split",
        _SUM,
        "load(split + s, quad + i)",
        "load(split, quad + i)",
    ),
    Bug("the first of a round's splits alone added", _SUM, "part[s][i].x", "part[0][i].x"),
)

# 64x64, 64x64k64 and any64x64 of all types but float16.
_FLAGS = ("-DEMULATED_TILES=0x2cu", "-w")


def build_planted(folder: Path, bugs: Sequence[Bug]) -> ctypes.CDLL:
    with alone(folder, "plant"):
        return build(folder, plant(folder, bugs, "sm80"), _FLAGS)


def cases() -> list[tuple[Data, str, dict]]:
    """Few and small, and between them every part of the kernel."""
    plain = draw(Conv(1, 9, 11, 40, 72, residual=True))
    odd = draw(
        Conv(2, 13, 12, 24, 40, kernel=(5, 3), stride=(2, 1), padding=(2, 3), dilation=(1, 2))
    )
    tall = draw(Conv(1, 11, 6, 16, 24, stride=(1, 2), padding=(2, 1), dilation=(2, 1)))
    joined = draw(Conv(1, 9, 7, 24, 72, shortcut=136, relu=False))
    for scale in (joined.scale, joined.shortcut_scale):
        scale[:6] = torch.tensor([0.0, 1e-6, -1e-6, -2.0, 1e-30, -1e-40])
    joined.shortcut_scale[8:14] = joined.shortcut_scale[:6].flip(0).clone()
    joined.scale[8] = 1.0
    joined.shortcut_x[0, 3, 2, 2] = torch.inf  # reaches even dead channels, as NaN
    grouped = draw(Conv(1, 7, 6, 64, 80, groups=2, residual=True))
    uneven = draw(Conv(1, 6, 5, 16, 24, groups=2))  # groups of 12: no 16-byte stores
    ragged = draw(Conv(1, 9, 7, 5, 33, kernel=(3, 2), dilation=(1, 2), residual=True))
    float32 = draw(Conv(1, 6, 6, 20, 24, dtype=torch.float32))
    nan = draw(Conv(1, 6, 6, 16, 64))
    nan.x[0, 5, 3, 3] = float("nan")
    return [
        (plain, "64x64", {}),
        (plain, "64x64k64", {"order": 1}),
        (plain, "64x64", {"splits": 3, "order": 2}),
        (odd, "64x64", {"order": 3}),
        (odd, "64x64", {"splits": 4}),
        (tall, "64x64k64", {}),
        (joined, "64x64", {}),
        (joined, "64x64", {"splits": 12, "order": 1}),
        (joined, "64x64", {"splits": 3, "order": 2}),
        (grouped, "64x64", {}),
        (uneven, "64x64", {"order": 1}),
        (ragged, "any64x64", {"order": 1}),
        (ragged, "any64x64", {"splits": 2}),
        (float32, "64x64", {"kind": "tf32"}),
        (float32, "64x64", {"kind": "float32"}),
        (nan, "64x64", {}),
    ]


def show(library: ctypes.CDLL, number: int, sweep: list) -> str:
    """What shows bug `number` (0: none) first, in words; empty where nothing does."""
    library.sm80_plant(number)
    for data, tile, how in sweep:
        y, report = run(library, data, tile, **how)
        if report:
            return f"{data.conv} {tile}: {report}"
        if difference := wrong(data, y, how.get("kind", "")):
            return f"{data.conv} {tile}: {difference}"
    return ""
