"""Bugs to plant in the tail's kernel, one at a time, and the convolutions that must show each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from emulated_sm90 import Conv, alone, beyond_allowed
from emulated_tail import Tail, build, drawn, run, whole
from planting import Bug, plant, rounds

__all__ = ["BUGS", "build_planted", "cases", "rounds", "show"]

_KERNEL, _MULTIPLY, _EPILOGUE = "sm80/tail.cuh", "sm80/tail_multiply.cuh", "sm80/epilogue.cuh"
_WAIT, _BARRIER, _COMMIT = "copies_wait<0>();", "__syncthreads();", "copies_commit();"
_OTHER = "shared_0 + (slice_bytes(C::kT) - place), next"
_FINISH = "finish<T, S, false, true>(sum, p.last, patch, pixel + multiplier.warp_m, pixels, channel"
_FETCH = "if (step + 1 < Shape::kSteps) fetch(step + 1, (step + 1) & 1);"

BUGS = (
    # ---- waits and barriers between slices ----
    Bug("no wait for a slice", _KERNEL, _WAIT, ";", "in flight", True),
    Bug("the wait is for one group too few", _KERNEL, _WAIT, "copies_wait<1>();", "in flight"),
    Bug("no barrier between slices", _KERNEL, _BARRIER, ";", "", True, _WAIT + _BARRIER),
    Bug("the wait after the barrier", _KERNEL, _WAIT + _BARRIER, _BARRIER + _WAIT, "in flight"),
    Bug(
        "a barrier before the first slice only",
        _KERNEL,
        _BARRIER,
        "if (channel == 0) __syncthreads();",
        context=_WAIT + _BARRIER,
    ),
    Bug(
        "no barrier before the first slice",
        _KERNEL,
        _BARRIER,
        "if (channel > 0) __syncthreads();",
        context=_WAIT + _BARRIER,
    ),
    Bug(
        "a slice's copies are no group",
        _KERNEL,
        _COMMIT,
        ";",
        "in flight",
        context=_COMMIT + "float sum[S::kMs]",
    ),
    # ---- where slices lie, and which ----
    Bug(
        "a slice refilled while it is read",
        _KERNEL,
        "slice_bytes(C::kT) - place",
        "place",
        "",
        True,
        _OTHER,
    ),
    Bug(
        "all slices read from one place",
        _KERNEL,
        "place = slice_bytes(C::kT) - place;",
        ";",
    ),
    Bug(
        "the first slice in a stage that is being read",
        _KERNEL,
        "(C::kStages - steps % C::kStages) % C::kStages",
        "1",
    ),
    Bug("no first slice", _KERNEL, "step == steps", "false"),
    Bug("the first slice's channels for all", _KERNEL, "next", "0", context=_OTHER),
    Bug(
        "the last slice never loaded",
        _KERNEL,
        "next < p.last.problem.k",
        "next + kSliceChannels < p.last.problem.k",
    ),
    Bug(
        "a ragged last slice left out",
        _KERNEL,
        "channel < p.last.problem.k",
        "channel + kSliceChannels <= p.last.problem.k",
    ),
    Bug(
        "the last step of the first product left out",
        _KERNEL,
        "p.first.schedule.main_steps",
        "p.first.schedule.main_steps - (p.first.schedule.main_steps > 1)",
    ),
    # ---- the epilogue of a slice ----
    Bug("one patch for all warps", _KERNEL, "warp * 16 * S::kPitch", "0", "race", True),
    Bug("the patches where slices are", _KERNEL, "tail_patches_at(C::kT)", "0"),
    Bug(
        "a pixel too many stored",
        _KERNEL,
        "pixels",
        "pixels + 1",
        "out of bounds",
        context="multiplier.warp_m, pixels",
    ),
    Bug(
        "a pixel too few stored",
        _KERNEL,
        "pixels",
        "pixels - 1",
        context="multiplier.warp_m, pixels",
    ),
    Bug(
        "all warps store the first one's pixels",
        _KERNEL,
        "pixel + multiplier.warp_m",
        "pixel",
        "twice",
    ),
    Bug(
        "every slice stored as the first",
        _KERNEL,
        "channel",
        "0",
        "twice",
        context=_FINISH,
    ),
    Bug(
        "the residual of the first slice",
        _EPILOGUE,
        "static_cast<const T*>(p.residual) + at",
        "static_cast<const T*>(p.residual) + (at - channel)",
        "",
        True,
    ),
    Bug(
        "the first activation's choice for the last",
        _EPILOGUE,
        "p.relu",
        "!p.relu",
        context="p.relu ? relu_keeping_nan(v)",
    ),
    Bug(
        "residual asked for that is behind the last pixel",
        _KERNEL,
        "i < count * p.problem.k * 2",
        "i < kPixels * p.problem.k * 2",
        "out of bounds",
    ),
    Bug(
        "residual asked for where there is none",
        _KERNEL,
        "p.residual == nullptr",
        "false",
        "out of bounds",
    ),
    Bug(
        "weights of a channel between too many",
        _KERNEL,
        "p.first.problem.k",
        "p.first.problem.k + 1",
        "out of bounds",
    ),
    # ---- the map between ----
    Bug(
        "no zeros in channels that are not there",
        _MULTIPLY,
        "has ? pack(a, b, T()) : 0u",
        "pack(a, b, T())",
        "",
        True,
    ),
    Bug("halves of a fragment exchanged", _MULTIPLY, "j % 2 * 2 + h", "h * 2 + j % 2"),
    Bug("the two channels of a word exchanged", _MULTIPLY, "pack(a, b, T())", "pack(b, a, T())"),
    Bug(
        "scales of other channels",
        _MULTIPLY,
        "8 * j + lane % 4 * 2",
        "8 * j + lane % 4",
    ),
    Bug(
        "one scale for two channels",
        _MULTIPLY,
        "affine_of<false>(p, channel + 1)",
        "affine_of<false>(p, channel)",
    ),
    Bug(
        "scales of channels that are not there",
        _MULTIPLY,
        "channel < p.problem.k",
        "channel <= p.problem.k",
        "out of bounds",
    ),
    Bug("always a ReLU between", _MULTIPLY, "p.relu", "true"),
    Bug("never a ReLU between", _MULTIPLY, "p.relu", "false"),
    Bug("a ReLU of one channel of two", _MULTIPLY, "b = relu_keeping_nan(b);", ";"),
    Bug(
        "the ReLU between loses NaN",
        _MULTIPLY,
        "a = relu_keeping_nan(a); b = relu_keeping_nan(b);",
        "a = a > 0.f ? a : 0.f; b = b > 0.f ? b : 0.f;",
    ),
    Bug(
        "rows of one half for both",
        _MULTIPLY,
        "sum[i][j][2 * h]",
        "sum[i][j][0]",
        context="fmaf(sum[i][j][2 * h], low",
    ),
    # ---- slices of weights ----
    Bug(
        "weights written without the swizzle",
        _MULTIPLY,
        "S::swizzle(row, chunk)",
        "(row * S::kRowBytes + chunk * 16)",
        "",
        True,
    ),
    Bug(
        "the part added where it should be exchanged",
        _MULTIPLY,
        "part ^ (step % 4 << 5)",
        "part + (step % 4 << 5)",
    ),
    Bug(
        "one panel read for all",
        _MULTIPLY,
        "step / 4 * Shape::kPanelBytes",
        "0",
    ),
    Bug("panels written one over the other", _MULTIPLY, "panel * Shape::kPanelBytes", "0"),
    Bug("the first panel's channels for all", _MULTIPLY, "panel * kPanelChannels", "0"),
    Bug(
        "weights of channels between that are not there",
        _MULTIPLY,
        "k < length",
        "true",
        "out of bounds",
    ),
    Bug(
        "weights of outputs that are not there",
        _MULTIPLY,
        "first + row + i * S::kRows < p.problem.k",
        "true",
        "out of bounds",
    ),
    Bug(
        "the first rows of weights for all",
        _MULTIPLY,
        "int64_t(first + row) * length",
        "int64_t(first + row / 2) * length",
    ),
    Bug("rows of weights one pass off", _MULTIPLY, "int64_t(i * S::kRows) * length", "0"),
    Bug(
        "the next fragments are these",
        _MULTIPLY,
        _FETCH,
        _FETCH.replace("fetch(step + 1", "fetch(step"),
    ),
    Bug("half a warp reads fragments", _MULTIPLY, _FETCH, "if (lane < 16) " + _FETCH, "divergent"),
    Bug("the other buffer is multiplied", _MULTIPLY, "b[step & 1]", "b[(step + 1) & 1]"),
    Bug("the first 16 channels between for all", _MULTIPLY, "between[i][step]", "between[i][0]"),
    Bug(
        "channels 8-15 before channels 0-7",
        _MULTIPLY,
        "j % 2 * 2",
        "2 - j % 2 * 2",
        context="[j % 2 * 2], T()",
    ),
)

_FLAGS = ("-DEMULATED_TILES", "-w")


def build_planted(folder: Path, bugs: Sequence[Bug]) -> ctypes.CDLL:
    with alone(folder, "plant"):
        return build(folder, plant(folder, bugs, "tail"), _FLAGS)


def cases() -> list[tuple[Tail, dict]]:
    """Few and small, and between them every part of the kernel."""
    plain = drawn(Conv(1, 12, 11, 24, 64), 200)
    exact = whole(Conv(2, 8, 9, 16, 40, relu=False), 136, last_relu=False)
    wide = drawn(Conv(1, 7, 19, 40, 72), 136, residual=False)
    short = drawn(Conv(2, 9, 7, 8, 64, kernel=1), 264)
    minus = drawn(Conv(1, 6, 7, 16, 40), 72)  # what is real becomes -Inf, and zero by the ReLU
    minus.weight, minus.scale = minus.weight.abs() + 0.25, -minus.scale.abs() - 0.5
    minus.x[0, 3, 2, 2] = torch.inf
    nan = drawn(Conv(1, 6, 7, 16, 24), 72)
    nan.x[0, 3, 2, 2] = float("nan")
    return [
        (plain, {}),
        (plain, {"order": 1}),
        (exact, {"order": 2}),
        (wide, {"order": 1}),
        (short, {}),
        (minus, {}),
        (nan, {"order": 3}),
    ]


def show(library: ctypes.CDLL, number: int, sweep: list) -> str:
    """What shows bug `number` (0: none) first, in words; empty where nothing does."""
    library.tail_plant(number)
    for data, how in sweep:
        y, report = run(library, data, **how)
        name = f"{data.conv}-{data.last_weight.shape[0]}"
        if report:
            return f"{name}: {report}"
        if difference := beyond_allowed(data, y):
            return f"{name}: {difference}"
    return ""
