"""Builds and calls the sm_80 kernel under emulation: g++ compiles its source, no GPU is needed."""

from __future__ import annotations

import ctypes
from dataclasses import fields, replace
from pathlib import Path

import torch
from emulated_sm90 import CSRC, ROOT, Conv, Data, Problem, build_library, differs, draw, nhwc, words
from emulated_sm90 import why_not as why_not
from torch import Tensor

TILES = words("128x128 128x64 64x64 64x64k64 64x32 any64x64")
# In the order of csrc/cuda/sm80/plan.h.
TYPES = words("bfloat16 float16 tf32 float32")
DTYPES = dict(
    zip(TYPES, (torch.bfloat16, torch.float16, torch.float32, torch.float32), strict=True)
)
NOT_COMPILED = {("float32", "128x128"), ("float32", "128x64")}
_KERNELS = ["emulate/run_sm80"]


def build(folder: Path, csrc: Path = CSRC, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    library = build_library(folder, "sm80", csrc, _KERNELS, ["sm80/plan"], defines)
    library.sm80_run.restype = None
    library.sm80_tile_name.restype = ctypes.c_char_p
    return library


class Choice(ctypes.Structure):
    _fields_ = [("tile", ctypes.c_int), ("splits", ctypes.c_int)]


class Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in words("tiles splits threads shared_bytes")]


class Workspace(ctypes.Structure):
    _fields_ = [("tickets", ctypes.c_int64), ("partial_floats", ctypes.c_int64)]


class Run(ctypes.Structure):
    """csrc/cuda/emulate/run_sm80.cpp."""

    _fields_ = (
        [("problem", Problem), ("choice", Choice)]
        + [(name, ctypes.c_int) for name in words("type relu launches order race")]
        + [
            (name, ctypes.c_void_p)
            for name in words(
                "x weight shortcut_x shortcut_weight scale shift shortcut_scale shortcut_shift "
                "residual y"
            )
        ]
        + [("error", ctypes.c_char * 800)]
    )


def run(
    library: ctypes.CDLL,
    data: Data,
    tile: str,
    kind: str = "",
    splits: int = 1,
    order: int = 0,
    launches: int = 1,
) -> tuple[Tensor, str]:
    """The output (NCHW), poisoned before, and the emulator's report, empty where it has none.

    kind: of TYPES; "": that of the data's dtype. launches: one after the other, with the same
    tickets.
    """
    c = data.conv
    operands = {
        name: None if value is None else nhwc(value) if value.ndim == 4 else value.contiguous()
        for name, value in ((f.name, getattr(data, f.name)) for f in fields(data)[1:])
    }
    operands["y"] = torch.full((c.n, *data.out_size(), c.k), float("nan"), dtype=c.dtype)
    call = Run(
        problem=data.problem(),
        choice=Choice(TILES.index(tile), splits),
        type=TYPES.index(kind or str(c.dtype).removeprefix("torch.")),
        relu=c.relu,
        launches=launches,
        order=order,
        race=1,
        **{name: None if t is None else t.data_ptr() for name, t in operands.items()},
    )
    library.sm80_run(ctypes.byref(call))
    return operands["y"].permute(0, 3, 1, 2), call.error.decode()


def wrong(data: Data, y: Tensor, kind: str = "") -> str:
    """How the output differs from float64, that of rounded operands where TF32 rounds them."""
    if kind == "tf32":
        names = words("x weight shortcut_x shortcut_weight")
        operands = {name: getattr(data, name) for name in names}
        data = replace(
            data, **{n: None if t is None else round_tf32(t) for n, t in operands.items()}
        )
    return differs(data, y)


def round_tf32(tensor: Tensor) -> Tensor:
    """To the nearest of TF32's 11 significant bits, ties away from zero."""
    bits = (tensor.view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(tensor.isfinite(), bits.view(torch.float32), tensor)


__all__ = ["ROOT", "Conv", "Data", "draw"]
