"""What this machine can do at best: multiply-adds and bytes read a second, on all torch threads."""

from __future__ import annotations

import time

import torch

from ..check import dtype_name
from . import machine

_ops = torch.ops.resnet_fused


def multiply_peak(dtype: torch.dtype = torch.float32, seconds: float = 0.05) -> float | None:
    """Multiply-adds a second in registers, on the instruction set in use.

    dtype: of the products, float32 or bfloat16; sums are float32. None where there are no compiled
    kernels or, for bfloat16, an instruction set without such products.
    """
    isa = machine.isa_in_use()
    if isa is None or (dtype == torch.bfloat16 and isa != "avx512bf16"):
        return None
    return _ops.multiply_peak(seconds, dtype_name(dtype))


def read_bandwidth(size: int, seconds: float = 0.1) -> float | None:
    """Bytes a second, reading `size` bytes over and over; None without the compiled kernels."""
    if machine.isa_in_use() is None:
        return None
    data = [torch.ones(size, dtype=torch.uint8)]  # written to: zeros would all be one page
    _ops.read_words(data)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or count == 0:
        _ops.read_words(data)
        count += 1
    return count * size / elapsed
