"""y = relu(a + b) in Triton, NaN passes. Every thread moves 16 bytes at a time."""

from __future__ import annotations

import triton
import triton.language as tl

from .conv import rounded


@triton.jit
def add_relu_kernel(a_ptr, b_ptr, y_ptr, count, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = a + b
    y = tl.where(y < 0, 0.0, y)
    tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), mask=inside)
