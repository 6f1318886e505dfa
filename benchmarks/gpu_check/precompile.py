"""Runs every candidate that tune will measure once: one of the processes that tuning.py starts.

    python -m benchmarks.gpu_check.precompile --share 0/8 resnet18-bfloat16-1

tune compiles one configuration after another, each for about a second. Triton keeps on disk what it
compiled, so processes side by side save most of that. And what fails here, whatever the exception,
tune is spared: `--left-out` names a file that gets a line for it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import torch

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.measure.candidates import ConvCall, run_once
from resnet_fused.measure.convolutions import Found, convolutions, weight_bytes
from resnet_fused.measure.networks import plain_net, random_images
from resnet_fused.measure.plans import worth_measuring

from . import faults
from .left_out import add, avoided

EACH_S = 20.0  # a candidate: compiling and one call


def convolutions_of(case: str, device: str, size: int = 224) -> tuple[list[Found], int]:
    """Those of a net, and the bytes of its weights. None of our convolutions runs."""
    model, dtype, batch = case.split("-")
    fused = rf.fuse(plain_net(model).to(device, getattr(torch, dtype)))
    x = random_images(int(batch), size=size).to(device, getattr(torch, dtype))
    with select.forced("torch"):
        found = convolutions(fused, x)
        return found, weight_bytes(fused)


def configured(case: str, device: str, size: int = 224) -> Iterator[tuple[ConvCall, str]]:
    """Every convolution of a net with each candidate of it."""
    for found in convolutions_of(case, device, size)[0]:
        for name in worth_measuring(found.call, select.candidates(found.call.shape)):
            yield found.call, name


def run_share(
    cases: Sequence[str],
    share: int,
    shares: int,
    left_out: Path,
    start: int = 0,
    device: str = "cuda",
    size: int = 224,
) -> int:
    """Runs one of `shares` parts of the candidates once, from its `start`-th on; how many it ran.

    Ends the process where the GPU cannot be used any more.
    """
    done = 0
    todo = itertools.chain.from_iterable(configured(case, device, size) for case in cases)
    mine = enumerate(itertools.islice(todo, share, None, shares))
    for i, (call, name) in itertools.islice(mine, start, None):
        if name in avoided(left_out, str(call.shape)):
            continue
        faults.announce(f"{i} {call.shape}: {name}")
        try:
            with faults.limit(EACH_S):
                run_once(call, name)
                why = faults.broken()
        except Exception as error:  # Triton's are of many kinds
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if why:
            fatal = bool(faults.broken())
            add(left_out, str(call.shape), name, why, fatal=fatal)
            if fatal:
                sys.exit(faults.BROKEN)
        done += 1
    return done


@click.command()
@click.option("--share", required=True, help="As 0/8.")
@click.option("--start", type=int, default=0)
@click.option("--left-out", type=click.Path(path_type=Path), required=True)
@click.argument("cases", nargs=-1)
def main(share: str, start: int, left_out: Path, cases: tuple[str, ...]) -> None:
    """Run a share of the candidates once."""
    mine, of = map(int, share.split("/"))
    print(f"{run_share(cases, mine, of, left_out, start)} candidates ran")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check.precompile")
