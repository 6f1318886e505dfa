"""The kinds of kernels that a GPU runs, and a few calls that tell whether one works at all.

A kind fails or hangs as one: on a GPU that has never run them the first thing to know is which.

    python -m benchmarks.gpu_check.families "sm90 stride 2"
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import click
import torch

from .ops_once import (
    Call,
    Check,
    add_relu,
    conv,
    head,
    rewritten,
    run_all,
    scale_shift_act,
    stem,
    tail,
    works_here,
)

LARGE = {"batch": 8, "size": 28}  # several tiles for each multiprocessor


def _cuda(config: str, channels: int = 64, out: int = 64, **rest) -> Check:
    return conv(Call("cuda", config, torch.bfloat16, channels, out, **rest))


def _triton(config: str, dtype: torch.dtype, **rest) -> Check:
    return conv(Call("triton", config, dtype, **rest))


def families() -> Mapping[str, Sequence[Check]]:
    """By name, which starts with the plan, or with "sm90" where only sm_90 has it."""
    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    return {
        "cuda add_relu": [add_relu("cuda")],
        "cuda scale_shift_act": [scale_shift_act()],
        "cuda sm80": [
            _cuda("sm80 64x64 split 1"),
            _cuda("sm80 128x128 split 1", 128, 256, extra="residual", **LARGE),
            _cuda("sm80 64x64k64 split 1", stride=2, extra="shortcut"),
        ],
        "cuda sm80 split-K": [_cuda("sm80 64x32 split 3"), _cuda("sm80 64x64 split 4", 256, 128)],
        "cuda sm80 any channels": [_cuda("sm80 any64x64 split 1", 3, 64, kernel=7, stride=2)],
        "cuda sm80 float32": [conv(Call("cuda", "sm80 64x64 split 1", full, extra="residual"))],
        "sm90 stride 1": [
            _cuda("sm90 p64x64 split 1"),
            _cuda("sm90 p128x128 split 1", 64, 128, extra="residual", **LARGE),
            _cuda("sm90 c128x256 split 1", 128, 256, **LARGE),
            _cuda("sm90 p128x256 split 1", 128, 256, kernel=1, **LARGE),
        ],
        "sm90 stride 2": [
            _cuda("sm90 p64x64 split 1", stride=2),
            _cuda("sm90 c128x192 split 1", 64, 128, stride=2, **LARGE),
        ],
        "sm90 split-K": [
            _cuda("sm90 p64x64 split 2", extra="shortcut"),
            _cuda("sm90 p64x128 split 4", 128, 136, extra="residual"),
            _cuda("sm90 p64x32 split 8", 512, 64),
        ],
        "sm90 shortcut": [_cuda("sm90 p64x128 split 1", 128, 128, extra="shortcut")],
        "sm90 overlap": [
            rewritten(Call("cuda", f"sm90 {config}", bf16, 512, 512))
            for config in ("p64x64 split 1", "p64x64 split 4", "tap-shift split 1")
        ],
        "sm90 32 channels": [_cuda("sm90 p128x64k32 split 1", 32)],
        "sm90 16 channels": [_cuda("sm90 p128x64k16 split 1", 16)],
        "sm90 tap-shift": [
            _cuda("sm90 tap-shift split 1"),
            _cuda("sm90 tap-shift split 1", 64, 128, extra="residual", **LARGE),
        ],
        "cuda stem": [stem(41), stem(320)],
        "cuda tail": [tail(64), tail(128)],
        "cuda head": [head(1, bf16), head(6, bf16), head(1, full)],
        "triton add_relu": [add_relu("triton")],
        "triton conv": [
            _triton("", bf16, extra="residual"),
            _triton("64x64x64 warps 4 stages 4 split 2", half),
            _triton("", full, extra="shortcut"),
        ],
    }


@click.command()
@click.argument("name", type=click.Choice(list(families())))
@click.option("--device", default="cuda", show_default=True)
@click.option("--each", type=click.FloatRange(min=0), default=0.0, help="Seconds for a call.")
def main(name: str, device: str, each: float) -> None:
    """Run the calls of a family, none where the device has no such kernels."""
    torch.set_num_threads(2)  # for float64: others run beside it
    where = torch.device(device, 0)
    here = works_here(name.split()[0], where)
    sys.exit(run_all(families()[name] if here else [], where, each))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check.families")
