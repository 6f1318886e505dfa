"""Builds and calls the tail's kernel, a convolution and the 1x1 behind it, under emulation."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from emulated_sm90 import CSRC, UNITS, Conv, Data, Problem, build_library, draw, nhwc, sparse, words
from torch import Tensor


def build(folder: Path, csrc: Path = CSRC, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    plans = ["sm80/plan", "sm80/tail"]
    library = build_library(folder, "tail", csrc, ["emulate/run_tail"], plans, defines)
    library.tail_run.restype = None
    return library


class TailProblem(ctypes.Structure):
    """csrc/cuda/sm80/tail.h."""

    _fields_ = [("first", Problem), ("k", ctypes.c_int)]


_OPERANDS = words("x weight scale shift last_weight last_scale last_shift residual")


class Run(ctypes.Structure):
    """csrc/cuda/emulate/run_tail.cpp."""

    _fields_ = (
        [("problem", TailProblem)]
        + [(name, ctypes.c_int) for name in words("type relu last_relu order")]
        + [(name, ctypes.c_void_p) for name in [*_OPERANDS, "y"]]
        + [("error", ctypes.c_char * 800)]
    )


@dataclass
class Tail(Data):
    """The first convolution's operands, as its Conv says, and the second's; the residual is added
    behind the second."""

    last_weight: Tensor | None = None
    last_scale: Tensor | None = None
    last_shift: Tensor | None = None
    last_relu: bool = True

    def problem(self) -> TailProblem:
        return TailProblem(super().problem(), self.last_weight.shape[0])

    @functools.cached_property
    def between(self) -> Tensor:
        """The map between in float64, before it is rounded."""
        x, weight = self.x.double(), self.weight.double()
        c = self.conv
        y = F.conv2d(x, weight, None, c.stride, self.padding(), c.dilation)
        y = y * self.scale.double().view(-1, 1, 1) + self.shift.double().view(-1, 1, 1)
        return torch.where(y < 0, 0.0, y) if c.relu else y

    @functools.cached_property
    def between_error(self) -> Tensor:
        """By how much the kernel's map between may differ from the oracle's rounded one: sums of
        float32 that another order may round to the neighbour."""
        size = _finite(self._compute_first_magnitude())
        rounded = self.between.to(self.conv.dtype).double()
        off = 4e-6 * size + 1e-7
        low = (self.between - off).to(self.conv.dtype).double()
        high = (self.between + off).to(self.conv.dtype).double()
        return _finite(torch.maximum((rounded - low).abs(), (high - rounded).abs()))

    def _compute_first_magnitude(self) -> Tensor:
        c = self.conv
        y = F.conv2d(
            _finite(self.x.double()).abs(), _finite(self.weight.double()).abs(), None,
            c.stride, self.padding(), c.dilation,
        )  # fmt: skip
        channel = (-1, 1, 1)
        return y * _finite(self.scale.double().abs()).view(channel) + _finite(
            self.shift.double().abs()
        ).view(channel)

    def _second(self, between: Tensor, absolute: bool = False) -> Tensor:
        to = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
        weight = to(self.last_weight)
        y = F.conv2d(to(between), weight)
        y = y * to(self.last_scale).view(-1, 1, 1)
        y = y + to(self.last_shift).view(-1, 1, 1)
        return y if self.residual is None else y + to(self.residual)

    @functools.cached_property
    def oracle(self) -> Tensor:
        """In float64, but for the map between, which is rounded as eager PyTorch rounds it."""
        y = self._second(self.between.to(self.conv.dtype))
        return torch.where(y < 0, 0.0, y) if self.last_relu else y

    @functools.cached_property
    def magnitude(self) -> Tensor:
        """What each output may be wrong by."""
        rounded = _finite(self.between.to(self.conv.dtype).double())
        size = _finite(self._second(rounded, absolute=True))
        weight = _finite(self.last_weight.double()).abs()
        spread = F.conv2d(self.between_error, weight)
        spread = spread * _finite(self.last_scale.double().abs()).view(-1, 1, 1)
        unit = UNITS[self.conv.dtype]
        return 1.01 * unit * _finite(self.oracle).abs() + 4e-6 * size + 1.01 * spread + 1e-7


def _finite(t: Tensor) -> Tensor:
    return t.nan_to_num(0.0, 0.0, 0.0)


def drawn(conv: Conv, k: int = 256, residual: bool = True, last_relu: bool = True) -> Tail:
    data = draw(conv)
    generator = torch.Generator().manual_seed(conv.seed + 7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    last = (normal(k, conv.k, 1, 1) * conv.k**-0.5).to(conv.dtype)
    tail = Tail(**vars(data), last_weight=last, last_scale=normal(k), last_shift=normal(k))
    tail.last_relu = last_relu
    tail.scale[1], tail.last_scale[2] = 0.0, 0.0
    if residual:
        tail.residual = normal(conv.n, k, *data.out_size()).to(conv.dtype)
    return tail


def whole(conv: Conv, k: int = 256, **how: bool) -> Tail:
    """Whole numbers that every step holds exactly; outputs of either sign."""
    data, generator = drawn(conv, k, **how), torch.Generator().manual_seed(conv.seed + 1)

    data.x = sparse(data.x, 0.5, generator)
    data.weight = sparse(data.weight, min(1.0, 16.0 / data.weight[0].numel()), generator)
    data.last_weight = sparse(data.last_weight, min(1.0, 6.0 / conv.k), generator)
    for name in words("scale last_scale"):
        setattr(data, name, torch.where(getattr(data, name) < 0, -1.0, 2.0))
    data.shift, data.last_shift = data.shift.round(), data.last_shift.round()
    if data.residual is not None:
        data.residual = data.residual.round()
    assert data.between.abs().max() <= 256
    assert data.oracle.abs().max() <= 256
    return data


def run(library: ctypes.CDLL, data: Tail, order: int = 0) -> tuple[Tensor, str]:
    """The output (NCHW), poisoned before, and the emulator's report, empty where it has none."""
    c = data.conv
    operands = {
        name: None if value is None else nhwc(value) if value.ndim == 4 else value.contiguous()
        for name, value in ((f.name, getattr(data, f.name)) for f in fields(data))
        if name in _OPERANDS
    }
    size = (c.n, *data.out_size(), data.last_weight.shape[0])
    operands["y"] = torch.full(size, float("nan"), dtype=c.dtype)
    call = Run(
        problem=data.problem(),
        type=int(c.dtype == torch.float16),
        relu=c.relu,
        last_relu=data.last_relu,
        order=order,
        **{name: None if t is None else t.data_ptr() for name, t in operands.items()},
    )
    library.tail_run(ctypes.byref(call))
    return operands["y"].permute(0, 3, 1, 2), call.error.decode()
