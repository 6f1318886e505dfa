"""Stages one after another, each with a time limit, whatever became of the one before."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import command, record
from .record import FAILED, INCOMPLETE, OUT_OF_TIME, PASSED, Record, Verdict

LARGEST_LOG = 64 << 10  # bytes that are kept, from the end
SECONDS = "GPU_CHECK_SECONDS"  # tells a command how long it has
MARGIN_S = 2.0  # of these, for its last words


def by_status(ended: command.Ended, scratch: Path) -> Verdict:
    """0 is passed and 3 incomplete, as in the other benchmarks."""
    if ended.code in (0, 3):
        return Verdict(PASSED if ended.code == 0 else INCOMPLETE)
    return Verdict(FAILED, f"exit status {ended.code}")


@dataclass(frozen=True)
class Stage:
    """Commands that run in turn until one fails, and how the last of them is judged.

    limit_s: of all of them together. judge: from the last command and the folder for files of the
    moment. log: whether the output is kept as a file; its end is in the summary anyway.
    repeat: whether it must run again although it passed before.
    """

    name: str
    commands: Sequence[Sequence[str]]
    limit_s: float
    judge: Callable[[command.Ended, Path], Verdict] = by_status
    env: Mapping[str, str] = field(default_factory=dict)
    log: bool = True
    repeat: bool = False


def run(
    stages: Iterable[Stage],
    current: Record,
    out: Path,
    *,
    cwd: Path,
    scratch: Path,
    on_stage: Callable[[str, float], None] = lambda name, limit_s: None,
) -> None:
    """Runs the stages that `current` lacks and adds them to it and to the files in `out`.

    Time that a stage leaves is there for those behind it: together they have what their limits add
    up to, or the record's "total_s" if that is less.
    """
    todo = [s for s in stages if s.repeat or s.name not in current["stages"]]
    left = min(sum(stage.limit_s for stage in todo), current["total_s"])
    for i, stage in enumerate(todo):
        limit = max(left - sum(later.limit_s for later in todo[i + 1 :]), min(stage.limit_s, left))
        on_stage(stage.name, limit)
        verdict, seconds, log = _run_one(stage, limit, cwd, scratch)
        left = max(left - seconds, 0.0)
        if stage.log:
            kept = log.encode()[-LARGEST_LOG:].decode(errors="replace")
            (out / f"{stage.name}.log").write_text(kept)
        tail = "\n".join(log.splitlines()[-30:])
        current["stages"][stage.name] = record.entry(verdict, seconds, limit, tail)
        record.write(out, current)


def _run_one(stage: Stage, limit_s: float, cwd: Path, scratch: Path) -> tuple[Verdict, float, str]:
    """How a stage ended, its seconds and all that its commands printed."""
    seconds, log = 0.0, ""
    for words in stage.commands:
        if seconds >= limit_s:
            why = f"after {seconds:.0f} s" if seconds else "no time was left"
            verdict = Verdict(OUT_OF_TIME, why)
            break
        left = limit_s - seconds
        env = {**stage.env, SECONDS: str(max(left - MARGIN_S, 1))}
        with tempfile.NamedTemporaryFile(dir=scratch, suffix=".log") as file:
            ended = command.run(words, Path(file.name), left, cwd=cwd, env=env)
        seconds += ended.seconds
        log += f"$ {' '.join(words)}\n{ended.log}"
        judge = stage.judge if words is stage.commands[-1] else by_status
        verdict = judge(ended, scratch)
        if ended.code is None:  # what it had found by then is worth keeping
            found = f": {verdict.why}" if verdict.details else ""
            why = f"after {seconds:.0f} s{found}"
            verdict = Verdict(OUT_OF_TIME, why, verdict.details)
        if verdict.outcome != PASSED:
            break
    return verdict, seconds, log
