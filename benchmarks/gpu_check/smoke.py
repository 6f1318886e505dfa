"""Every family of kernels for a moment, each in a process of its own, side by side.

    ok          all answers are right
    wrong       an answer is not, or a call was refused
    hung        a call did not come back
    fault       a call has broken the process
    absent      this GPU or build has no such kernels
    unfinished  there was no time for it

Exit status 0: all that is here is ok; 1: something is not, or nothing is here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from . import command, faults
from .facts import ROOT
from .run import SECONDS

OK, WRONG, HUNG, FAULT, ABSENT = "ok", "wrong", "hung", "fault", "absent"
UNFINISHED = "unfinished"
EACH_S = 15.0  # a call; Triton compiles within the first
FILE = "smoke.json"
CALLS = (sys.executable, "-m", "benchmarks.gpu_check.families")


@dataclass(frozen=True)
class Found:
    """What became of a family. why: one line."""

    outcome: str
    why: str
    seconds: float


def judge(ended: command.Ended) -> Found:
    """From what was printed of a family."""
    lines = ended.log.strip().splitlines() or [""]
    call = faults.last_announced(ended.log)
    wrong = "; ".join(line.removeprefix("! ") for line in lines if line.startswith("! "))
    if faults.TIMEOUT.search(ended.log):
        outcome, why = HUNG, f"in {call}: {faults.where(ended.log)}"
    elif ended.code is None:
        outcome, why = UNFINISHED, f"in {call or 'no call'}"
    elif lines[-1] == "0 calls, 0 wrong":
        outcome, why = ABSENT, ""
    elif ended.code == 0:
        outcome, why = OK, lines[-1]
    elif ended.code == 1 and wrong:
        outcome, why = WRONG, wrong
    else:
        what = wrong or f"exit status {ended.code}, {lines[-1]}"
        outcome, why = FAULT, f"in {call or 'no call'}: {what}"
    return Found(outcome, why, round(ended.seconds, 1))


def look(names: Sequence[str], limit_s: float, on_found: Callable[[str, Found, str], None]) -> None:
    """Runs the families; on_found(name, found, log) as each ends."""
    end = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def one(name: str) -> command.Ended:
            words = (*CALLS, name, "--each", str(EACH_S))
            log = Path(folder, f"{names.index(name)}.log")
            left = end - time.monotonic()
            if left <= 0:
                return command.Ended(None, 0.0, "")
            return command.run(words, log, left, cwd=ROOT)

        asked = {pool.submit(one, name): name for name in names}
        for future in as_completed(asked):
            ended = future.result()
            on_found(asked[future], judge(ended), ended.log)


def exit_code(found: Mapping[str, Found]) -> int:
    outcomes = {each.outcome for each in found.values()} - {ABSENT}
    return 0 if outcomes == {OK} else 1


def suspects(folder: Path) -> set[str]:
    """Words in the names of tests that may cost their process, by what hung or faulted here."""
    try:
        found = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return set()
    costly = [name for name, each in found.items() if each["outcome"] in (HUNG, FAULT)]
    words = {word for name in costly for word in name.split()}
    if "sm90" in words:  # which the plan "cuda" takes
        words.add("cuda")
    return words & {"triton", "cuda", "sm80", "sm90", "stem", "tail"}


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=30.0, envvar=SECONDS, show_envvar=True
)
def main(path: Path | None, seconds: float) -> None:
    """Call each family of kernels, and hold it against float64."""
    from .families import families

    found: dict[str, Found] = {}

    def tell(name: str, each: Found, log: str) -> None:
        found[name] = each
        print(f"---- {name}\n{log}", flush=True)
        if path is not None:
            path.write_text(json.dumps({n: asdict(f) for n, f in found.items()}) + "\n")

    look(list(families()), seconds, tell)
    for name, each in found.items():
        print(f"{each.outcome:10}  {name:24}  {each.why}")
    sys.exit(exit_code(found))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check.smoke")
