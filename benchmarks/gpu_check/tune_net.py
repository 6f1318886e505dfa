"""Tunes the convolutions of a net one by one: the process that tuning.py starts, again if need be.

    python -m benchmarks.gpu_check.tune_net --left-out FILE resnet18-bfloat16-1

As `resnet-fused tune`, which must not go on where a kernel is wrong: here it is noted in the file,
and the others are measured. Each answer is kept at once.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import click

from resnet_fused.measure.candidates import WrongCandidate
from resnet_fused.measure.convolutions import Found
from resnet_fused.measure.plans import Row, measure_convolution
from resnet_fused.tune import Tuning, learn

from . import faults
from .left_out import add, avoided
from .precompile import convolutions_of

EACH_S = 30.0  # a convolution; what precompile had no time for is compiled here
SECONDS = 0.1  # of them, timed


def row_of(found: Found, weight_bytes: int, left_out: Path) -> Row:
    """Measures what is not left out; what turns out to be wrong is, from then on."""
    shape = str(found.call.shape)
    while True:
        without = avoided(left_out, shape)
        try:
            return measure_convolution(
                found, weight_bytes=weight_bytes, seconds=SECONDS, without=without
            )
        except WrongCandidate as wrong:
            add(left_out, shape, wrong.candidate, str(wrong))


@click.command()
@click.option("--start", type=int, default=0, help="The first convolution.")
@click.option("--left-out", type=click.Path(path_type=Path), required=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--size", default=224, show_default=True)
@click.argument("case")
def main(start: int, left_out: Path, device: str, size: int, case: str) -> None:
    """Tune the convolutions of a net."""
    found, weight_bytes = convolutions_of(case, device, size)
    for i, each in itertools.islice(enumerate(found), start, None):
        faults.announce(f"{i} {each.call.shape}: ")
        with faults.limit(EACH_S):
            row = row_of(each, weight_bytes, left_out)
        print(Tuning([row], learn([row])), flush=True)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check.tune_net")
