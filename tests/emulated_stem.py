"""Builds and calls the stem's kernel, convolution and max-pool in one, under emulation."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from emulated_sm90 import (
    CSRC,
    UNITS,
    Conv,
    Data,
    Problem,
    beyond_allowed,
    build_library,
    draw,
    nhwc,
    sparse,
    words,
)
from torch import Tensor

TILES = (8, 4)  # pooled rows, in the order of csrc/cuda/sm80/stem.h


def build(folder: Path, csrc: Path = CSRC, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    plans = ["sm80/plan", "sm80/stem"]
    library = build_library(folder, "stem", csrc, ["emulate/run_stem"], plans, defines)
    library.stem_run.restype = None
    return library


class Run(ctypes.Structure):
    """csrc/cuda/emulate/run_stem.cpp."""

    _fields_ = (
        [("problem", Problem)]
        + [(name, ctypes.c_int) for name in words("tile type relu blocks order")]
        + [(name, ctypes.c_void_p) for name in words("x weight scale shift y")]
        + [("error", ctypes.c_char * 800)]
    )


def pool(y: Tensor) -> Tensor:
    return F.max_pool2d(y, 3, 2, 1)


class Stem(Data):
    """A convolution's operands; the oracle is pooled."""

    @functools.cached_property
    def oracle(self) -> Tensor:
        return pool(self._compute(absolute=False))

    @functools.cached_property
    def magnitude(self) -> Tensor:
        """What each output may be wrong by: a maximum is no more wrong than its worst input."""
        y, size = self._compute(absolute=False), self._compute(absolute=True)
        allowed = 1.01 * UNITS[self.conv.dtype] * y.abs() + 4e-6 * size + 1e-7
        return pool(allowed.nan_to_num(0.0, 0.0, 0.0))

    @functools.cached_property
    def exact(self) -> Tensor:
        """As eager PyTorch computes it: rounded, then pooled."""
        return pool(self._compute(absolute=False).to(self.conv.dtype))


def drawn(conv: Conv) -> Stem:
    return Stem(**vars(draw(conv)))


def whole(conv: Conv) -> Stem:
    """Whole numbers whose sums both types hold exactly; outputs of either sign."""
    data, generator = drawn(conv), torch.Generator().manual_seed(conv.seed + 1)

    data.x = sparse(data.x, 0.5, generator)
    data.weight = sparse(data.weight, min(1.0, 60.0 / data.weight[0].numel()), generator)
    data.scale = torch.where(data.scale < 0, -1.0, 2.0)
    data.shift = data.shift.round()
    return data


def below_zero(conv: Conv) -> Stem:
    """All outputs of the convolution are negative, and nothing is cut off."""
    data = whole(replace(conv, relu=False))
    data.scale = -data.scale.abs()
    data.shift = data.shift - 200
    assert data.exact.max() < 0
    return data


def overflowing(conv: Conv) -> Stem:
    data = whole(replace(conv, dtype=torch.float16, relu=False))
    data.scale = data.scale * 4096
    assert data.exact.isinf().any()
    return data


def not_finite_anywhere(conv: Conv, dtype: torch.dtype) -> Stem:
    """An image for each place of one value: the corners, the middle, and beside each window."""
    nan, inf, last = float("nan"), torch.inf, conv.c - 1
    places = [(0, 0, 0, nan), (last, 0, -1, nan), (0, -1, 0, nan), (last, -1, -1, nan)]
    places += [(0, conv.h // 2, conv.w // 2, value) for value in (inf, -inf)]
    places += [(c, 3 + column, column, nan) for c in {0, last} for column in range(4, 10)]
    data = drawn(replace(conv, n=len(places), dtype=dtype))
    for image, (channel, row, column, value) in enumerate(places):
        data.x[image, channel, row, column] = value
    return data


NOT_FINITE_CHANNELS = [3, 10, 20, 30]


def not_finite_channels(conv: Conv) -> Stem:
    """For 72 output channels; those of the list become NaN, the last one -Inf and so 0."""
    data = drawn(conv)
    data.weight[3, 2, 6, 6] = float("nan")
    data.weight[10, 0, 0, 0] = torch.inf
    data.scale[20], data.shift[30], data.shift[71] = float("nan"), float("nan"), -torch.inf
    return data


def not_finite_of(y: Tensor) -> list[int]:
    """Output channels with a NaN."""
    return y.isnan().any((0, 2, 3)).nonzero().flatten().tolist()


def tensors_of(data: Stem) -> dict[str, Tensor]:
    """As a kernel takes them: NHWC, the output poisoned."""
    c = data.conv
    size = [(n - 1) // 2 + 1 for n in data.out_size()]
    y = torch.full((c.n, *size, c.k), float("nan"), dtype=c.dtype)
    weights = {"weight": nhwc(data.weight), "scale": data.scale, "shift": data.shift}
    return {"x": nhwc(data.x), **weights, "y": y}


def agreeing(data: Stem, outcome: tuple[Tensor, str]) -> Tensor:
    """What a run gave, if it is near enough to float64 and the emulator has nothing to say."""
    y, report = outcome
    assert not report
    assert not beyond_allowed(data, y)
    return y


def check_exact(data: Stem, outcome: tuple[Tensor, str]) -> None:
    """The same, bit for bit what eager PyTorch computes."""
    y, report = outcome
    assert not report
    assert torch.equal(y, data.exact)


def run(
    library: ctypes.CDLL, data: Stem, rows: int = 8, blocks: int = 2, order: int = 0
) -> tuple[Tensor, str]:
    """The output (NCHW), poisoned before, and the emulator's report, empty where it has none."""
    c = data.conv
    tensors = tensors_of(data)
    call = Run(
        problem=data.problem(),
        tile=TILES.index(rows),
        type=int(c.dtype == torch.float16),
        relu=c.relu,
        blocks=blocks,
        order=order,
        **{name: t.data_ptr() for name, t in tensors.items()},
    )
    library.stem_run(ctypes.byref(call))
    return tensors["y"].permute(0, 3, 1, 2), call.error.decode()
