"""Tunes nets on a GPU whose kernels may be wrong, hang or fault.

    python -m benchmarks.gpu_check.tuning --left-out FILE resnet18-bfloat16-1

First every candidate runs once, in several processes, then each net is tuned without those that
failed. A process that ends in the middle loses what it had announced, another one does the rest.
Exit status 0: all that is right is tuned; 1: something was left out or out of time.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from . import command, faults
from .facts import ROOT
from .left_out import add, read
from .run import SECONDS

MOST_PROCESSES = 8
SHARE = 0.6  # of the time, for the first runs at most
PRECOMPILE = (sys.executable, "-m", "benchmarks.gpu_check.precompile")
TUNE_NET = (sys.executable, "-m", "benchmarks.gpu_check.tune_net")


def run_through(words: Sequence[str], left_out: Path, log: Path, end: float) -> tuple[bool, str]:
    """Runs a command that announces "NUMBER CONVOLUTION: CANDIDATE" before each piece of work.

    Where it ends within one, that is left out, and it runs again from the next one on.

    Returns whether it came to its end in time, and all that was printed.
    """
    printed, start = "", 0
    while True:
        again = (*words, "--start", str(start), "--left-out", str(left_out))
        ended = command.run(again, log, end - time.monotonic(), cwd=ROOT)
        printed += ended.log
        if ended.code in (0, None):
            return ended.code == 0, printed
        number, _, what = faults.last_announced(ended.log).partition(" ")
        convolution, _, candidate = what.partition(": ")
        known = [(row["convolution"], row["candidate"]) for row in read(left_out)]
        if (convolution, candidate) not in known:
            add(left_out, convolution or words[-1], candidate, _why(ended), fatal=bool(candidate))
        if not number:  # another one would end as early
            return True, printed
        start = int(number) + 1


def _why(ended: command.Ended) -> str:
    if faults.TIMEOUT.search(ended.log):
        return f"hung in {faults.where(ended.log)}"
    return f"exit status {ended.code}, {(ended.log.strip().splitlines() or [''])[-1]}"


@click.command()
@click.option("--left-out", type=click.Path(path_type=Path), required=True)
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=75.0, envvar=SECONDS, show_envvar=True
)
@click.argument("nets", nargs=-1, required=True)
def main(left_out: Path, seconds: float, nets: tuple[str, ...]) -> None:
    """Tune nets such as resnet18-bfloat16-1, the first one first."""
    start = time.monotonic()
    left_out.unlink(missing_ok=True)
    shares = min(os.cpu_count() or 1, MOST_PROCESSES)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(shares) as pool:

        def first(i: int) -> str:
            words = (*PRECOMPILE, "--share", f"{i}/{shares}", *nets)
            end = start + SHARE * seconds  # what has not run by then is tuned all the same
            return run_through(words, left_out, Path(folder, f"{i}.log"), end)[1]

        print(*pool.map(first, range(shares)), sep="", flush=True)
        for net in nets:
            end, log = start + seconds, Path(folder, "tune.log")
            in_time, printed = run_through((*TUNE_NET, net), left_out, log, end)
            print(printed, flush=True)
            if not in_time:
                add(left_out, net, "", "out of time")
    found = read(left_out)
    for row in found:
        print(f"left out: {row['convolution']} {row['candidate']}: {row['why']}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check.tuning")
