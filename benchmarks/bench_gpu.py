"""Whole nets and their layers on a GPU, beside other engines: python -m benchmarks.bench_gpu

A long run can be divided: `--json FILE --resume` goes on with what FILE lacks. Exits with 0 where
everything was measured, 1 where ours failed or was wrong, 2 without a GPU and for wrong usage.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console

from resnet_fused.commands import picture
from resnet_fused.commands.options import FILE, SECONDS, BatchSizes

from . import gpu_contest, gpu_record, gpu_show, record, show
from .arguments import Cases, Words
from .cases import Case
from .common import console as new_console
from .common import one_line, progress_bar
from .gpu_contest import DTYPES, Setup
from .gpu_engines import TITLES

NETS = ("resnet18", "resnet50")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--only",
    type=Words(TITLES),
    default=",".join(TITLES),
    show_default="all",
    help=f"Engines to run, some of {', '.join(TITLES)}.",
)
@click.option("--models", "names", type=Words(NETS), default=",".join(NETS), help="Nets.")
@click.option("--batches", type=BatchSizes(), default="1,8,32,128,256", help="Batch sizes.")
@click.option("--dtypes", type=Words(DTYPES), default=",".join(DTYPES), help="Precisions.")
@click.option("--cases", type=Cases(dtypes=DTYPES), help="These, like resnet18-bfloat16-128.")
@click.option("--layers/--no-layers", default=True, help="Whether each layer is timed, too.")
@click.option(
    "--configurations", is_flag=True, help="Time every configuration of ours in each layer, too."
)
@click.option("--size", type=click.IntRange(min=32), default=224, help="Height and width.")
@click.option("--seconds", type=SECONDS, default=6.0, help="Timed, per case.")
@click.option("--rounds", type=click.IntRange(min=1), help="Interleaved rounds, not --seconds.")
@click.option("--json", "json_path", type=FILE, help="Write the record here, after each case.")
@click.option("--resume", is_flag=True, help="Keep what the file of --json has; measure the rest.")
@click.option("--chart", type=FILE, help="Write bar charts (PNG) here.")
@click.option("--dry-run", is_flag=True, help="Tiny nets on the CPU, no times: does it all run?")
def main(
    only: tuple[str, ...],
    names: tuple[str, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    cases: tuple[Case, ...] | None,
    layers: bool,
    configurations: bool,
    size: int,
    seconds: float,
    rounds: int | None,
    json_path: Path | None,
    resume: bool,
    chart: Path | None,
    dry_run: bool,
) -> None:
    """Time the fused net on a GPU beside PyTorch, torch.compile, cuDNN's fused ops and JAX.

    Rounds are interleaved; kernels are timed in CUDA graphs on both sides. Ratios are to the
    fastest of the others. An engine that is not installed is skipped and named.
    """
    if resume and json_path is None:
        raise click.UsageError("--resume goes with --json")
    if not (dry_run or torch.cuda.is_available()):
        raise click.UsageError("this needs a GPU that torch can use; --dry-run does without")
    if chart:
        picture.require()
    for path in filter(None, (json_path, chart)):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True  # everybody's cuDNN takes the algorithm it measures best
    setup = Setup(only, dry_run, layers, configurations, size, seconds, rounds)
    if cases is None:
        cases = tuple(Case(m, d, b) for m in names for d in dtypes for b in batches)

    out = new_console()
    fresh = gpu_record.new(setup)
    current = record.resumed(json_path, fresh, _read, _difference) if resume else fresh
    _measure(out, cases, setup, current, json_path)
    gpu_show.tables(out, current)
    if chart and current["cases"]:
        show.chart(chart, current, gpu_show.surroundings(current), columns=2)
    if gpu_show.failures(current):
        sys.exit(1)


_read = partial(record.read, maker=gpu_record.MAKER)
_difference = partial(
    record.difference, machine=gpu_record.SAME_MACHINE, setup=gpu_record.SAME_SETUP
)


def _measure(
    out: Console,
    cases: tuple[Case, ...],
    setup: Setup,
    current: record.Record,
    json_path: Path | None,
) -> None:
    """Adds to the record what it lacks of `cases`, and writes it after each."""
    todo = [case for case in cases if str(case) not in current["cases"]]
    with progress_bar(out) as progress:
        task = progress.add_task("", total=None)
        for number, case in enumerate(todo, 1):
            heading = f"{case}, {number} of {len(todo)}"

            def on_stage(text: str, done: int, total: int, heading: str = heading) -> None:
                text = f"{heading}: {text}"
                progress.update(task, description=text, completed=done, total=total or None)

            try:
                entry = gpu_contest.measure(case, setup, on_stage)
            except Exception as error:  # ours: a peer's failure is a row; other cases may go well
                current["failed"][str(case)] = one_line(error)
            else:
                current["failed"].pop(str(case), None)
                current["cases"][str(case)] = entry
            if json_path:
                record.write(json_path, current)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.bench_gpu")
