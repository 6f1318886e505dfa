"""Whole nets through every engine a user would pick on a CPU: python -m benchmarks.bench_engines

`--check` measures the project's goals and exits with 0 where all are reached, 1 where one is
missed, 3 where none is missed but some could not be measured in full. A long run can be divided:
`--json FILE --resume` goes on with what FILE lacks.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from resnet_fused import models
from resnet_fused.commands import picture
from resnet_fused.commands.options import FILE, SECONDS, BatchSizes

from . import accuracy, record, show
from .arguments import Cases, Words
from .cases import DTYPES, Case
from .common import Unavailable, console, progress_bar
from .contest import REST_S, Contest, Setup
from .goals import GOALS, Outcome, judge, overall
from .peers import BY_KEY, ENTRANTS

ACCURACY = "accuracy"  # what --cases calls the errors over several seeds
EXIT_CODES = {Outcome.PASS: 0, Outcome.FAIL: 1, Outcome.INCOMPLETE: 3}  # 2 is click's, for usage


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--only", type=Words(BY_KEY), default=",".join(BY_KEY), help="Engines to run.")
@click.option(
    "--models", "names", type=Words(models.BUILDERS), default="resnet18,resnet50", help="Nets."
)
@click.option("--batches", type=BatchSizes(), default="1,8,32", help="Batch sizes.")
@click.option("--dtypes", type=Words(DTYPES), default=",".join(DTYPES), help="Precisions.")
@click.option("--cases", type=Cases((ACCURACY,)), help="Like resnet18-float32-8,accuracy.")
@click.option("--size", type=click.IntRange(min=32), default=224, help="Height and width.")
@click.option("--threads", type=click.IntRange(min=1), help="Of every engine [default: torch's].")
@click.option("--seconds", type=SECONDS, default=20.0, help="Timed, per case.")
@click.option("--rounds", type=click.IntRange(min=1), help="Interleaved rounds, not --seconds.")
@click.option("--rest", type=SECONDS, default=REST_S, help="Before each sample, s.")
@click.option("--json", "json_path", type=FILE, help="Write the record here, after each case.")
@click.option("--resume", is_flag=True, help="Keep what the file of --json has; measure the rest.")
@click.option("--chart", type=FILE, help="Write bar charts (PNG) here.")
@click.option("--check", is_flag=True, help="Measure the goals and set the exit code.")
def main(
    only: tuple[str, ...],
    names: tuple[str, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    cases: tuple[Case | str, ...] | None,
    size: int,
    threads: int | None,
    seconds: float,
    rounds: int | None,
    rest: float,
    json_path: Path | None,
    resume: bool,
    chart: Path | None,
    check: bool,
) -> None:
    """Time the fused net beside PyTorch, torch.compile, ONNX Runtime, OpenVINO, ncnn and MNN.

    Each engine runs in its own process with the same number of threads; rounds are interleaved.
    Ratios are to the fastest of the others. An engine that is not installed is skipped and named.
    """
    if resume and json_path is None:
        raise click.UsageError("--resume goes with --json")
    if chart:
        picture.require()
    for path in filter(None, (json_path, chart)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    entrants = [entrant for entrant in ENTRANTS if entrant.key in only]
    setup = Setup(entrants, torch.get_num_threads(), size, seconds, rounds, rest)
    if cases is None and check:
        cases = (ACCURACY, *dict.fromkeys(goal.case for goal in GOALS))
    elif cases is None:
        cases = tuple(Case(m, d, b) for m in names for d in dtypes for b in batches)

    out = console()
    current = record.new(setup)
    if resume:
        current = record.resumed(json_path, current, record.read, record.difference)
    _measure(out, cases, setup, current, json_path)
    show.tables(out, current)
    if chart:
        show.chart(chart, current, show.surroundings(current), columns=3)
    if check:
        _conclude(out, cases, current)


def _measure(
    out: Console,
    cases: tuple[Case | str, ...],
    setup: Setup,
    current: record.Record,
    json_path: Path | None,
) -> None:
    """Adds to the record what it lacks of `cases`, and writes it after each."""
    done = current["cases"].keys() | ({ACCURACY} if current["accuracy"] else set())
    todo = [case for case in cases if str(case) not in done]
    batch = max((case.batch for case in todo if case != ACCURACY), default=1)
    with progress_bar(out) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("", total=None)
        contest = Contest(setup, Path(folder), batch)
        for number, case in enumerate(todo, 1):
            heading = f"{case}, {number} of {len(todo)}"
            on_stage = partial(_show_stage, progress, task, heading)
            if case == ACCURACY:
                current["accuracy"] = accuracy.measure(setup.size, on_stage)
            else:
                try:
                    measured = contest.measure(case, on_stage)
                except Unavailable as why:  # ours; a peer's failure is a row
                    raise click.ClickException(f"{case}: the fused net failed: {why}") from why
                current["cases"][str(case)] = record.case_entry(case, *measured)
            if json_path:
                record.write(json_path, current)


def _show_stage(
    progress: Progress, task: TaskID, heading: str, text: str, done: int, total: int
) -> None:
    progress.update(task, description=f"{heading}: {text}", completed=done, total=total or None)


def _conclude(out: Console, cases: tuple[Case | str, ...], current: record.Record) -> None:
    """Prints what became of the goals that `cases` asks about, and exits accordingly."""
    verdicts = [judge(goal, current["cases"]) for goal in GOALS if goal.case in cases]
    outcomes = [verdict.outcome for verdict in verdicts]
    if ACCURACY in cases:
        outcomes += [Outcome.PASS if row["ok"] else Outcome.FAIL for row in current["accuracy"]]
    if verdicts:
        out.print(show.verdict_table(verdicts))
    outcome = overall(outcomes)
    show.conclusion(out, outcome)
    sys.exit(EXIT_CODES[outcome])


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.bench_engines")
