"""`make gpu-check`: build, test, sanitize, tune and bench on the GPU at hand, in under 8 minutes.

Exit status 0: all that was asked for passed; 1: something failed or ran out of time; 2: there is no
GPU, or the arguments are wrong; 3: nothing failed, but something could not be done (a sanitizer
that the machine refuses).
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from ..arguments import Words
from . import command, record
from .facts import ROOT
from .run import run
from .stages import NAMES, USUAL, stages

FACTS_S = 60
COLOURS = {record.PASSED: "green", record.INCOMPLETE: "yellow"}


@click.command()
@click.option(
    "--stages",
    "asked",
    type=Words(NAMES),
    default=",".join(USUAL),
    show_default=True,
    help=f"Some of {', '.join(NAMES)}.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default="build/gpu-check",
    show_default=True,
    help="Folder for at most 8 files.",
)
@click.option("--resume", is_flag=True, help="Leave out what passed in --out on these sources.")
@click.option(
    "--total", type=click.FloatRange(min=1), default=460.0, show_default=True, help="Seconds."
)
def main(asked: tuple[str, ...], out: Path, resume: bool, total: float) -> None:
    """Turn the GPU at hand into tests, sanitizer runs, tuned answers and a benchmark's record.

    Nothing is fetched: torch with CUDA, Triton, nvcc and pytest must be there.
    """
    console = Console()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # of a fault: its stack is enough
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        start = time.monotonic()
        facts = look(scratch)
        if facts["gpu"] is None:
            raise click.UsageError(f"gpu-check needs an NVIDIA GPU, but {facts['why']}")
        current = record.new(facts, max(total - (time.monotonic() - start), 0))
        if resume:
            current = record.resumed(out, current)
        record.write(out, current)
        run(
            [stage for stage in stages(out, scratch) if stage.name in asked],
            current,
            out,
            cwd=ROOT,
            scratch=scratch,
            on_stage=lambda name, limit: console.print(f"{name}, up to {limit:.0f} s ..."),
        )
    show(console, current)
    sys.exit(record.exit_code(current, asked))


def look(scratch: Path) -> dict[str, Any]:
    """What facts.py says of this machine."""
    words = [sys.executable, "-m", "benchmarks.gpu_check.facts"]
    ended = command.run(words, scratch / "facts.log", FACTS_S, cwd=ROOT)
    try:
        return json.loads(ended.log.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return {"gpu": None, "why": f"torch cannot say so: {ended.tail or 'no answer'}"}


def show(console: Console, current: record.Record) -> None:
    """The stages as a table; the end of what failed below it."""
    about = current["facts"]
    title = f"{about['gpu']}, driver {about.get('driver')}, torch {about.get('torch')}, "
    title += f"triton {about.get('triton')}, {about.get('commit', '')[:12]}"
    table = Table("stage", "outcome", "seconds", "", title=title, title_justify="left")
    for name, stage in current["stages"].items():
        colour = COLOURS.get(stage["outcome"], "red")
        outcome = f"[{colour}]{stage['outcome']}[/{colour}]"
        table.add_row(name, outcome, f"{stage['seconds']:g}", stage["why"])
    for name, stage in current["stages"].items():
        if stage["outcome"] != record.PASSED:
            console.print(f"{name}:\n{stage['tail']}", markup=False, highlight=False)
    console.print(table)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check")
