"""Builds and calls the Hopper stem's kernel, convolution and max-pool in one, under emulation."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from emulated_sm90 import CSRC, Problem, build_library, words
from emulated_stem import Stem, tensors_of
from torch import Tensor

TILES = (112, 64)  # columns of the convolution, in the order of csrc/cuda/sm90/stem.h


def build(folder: Path, csrc: Path = CSRC, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    library = build_library(folder, "stem90", csrc, ["emulate/run_stem90"], ["sm90/stem"], defines)
    library.stem90_run.restype = None
    return library


class Run(ctypes.Structure):
    """csrc/cuda/emulate/run_stem90.cpp."""

    _fields_ = (
        [("problem", Problem)]
        + [(name, ctypes.c_int) for name in words("tile rows bfloat16 relu blocks order")]
        + [(name, ctypes.c_void_p) for name in words("x weight scale shift y")]
        + [("error", ctypes.c_char * 800)]
    )


class Choice(ctypes.Structure):
    _fields_ = [("tile", ctypes.c_int), ("rows", ctypes.c_int)]


class Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in words("blocks channel_tiles shared_bytes")]


def run(
    library: ctypes.CDLL,
    data: Stem,
    columns: int = 112,
    rows: int = 4,
    blocks: int = 2,
    order: int = 0,
) -> tuple[Tensor, str]:
    """The output (NCHW), poisoned before, and the emulator's report, empty where it has none.

    columns: of the convolution, a tile's. rows: of the pool, a band's.
    """
    c = data.conv
    tensors = tensors_of(data)
    call = Run(
        problem=data.problem(),
        tile=TILES.index(columns),
        rows=rows,
        bfloat16=c.dtype == torch.bfloat16,
        relu=c.relu,
        blocks=blocks,
        order=order,
        **{name: t.data_ptr() for name, t in tensors.items()},
    )
    library.stem90_run(ctypes.byref(call))
    return tensors["y"].permute(0, 3, 1, 2), call.error.decode()
