"""The stages: what each runs, for how long, and what counts as fine.

Those that run unless others are named have limits that add up to under 8 minutes, with the time
that an overdue stage takes to end. `slow` is what they leave out: tests that compile a lot. On an
H100 with 16 processors `smoke` took 20 s; the other limits are estimates.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from . import left_out, smoke, watched
from .command import Ended
from .facts import ROOT
from .record import FAILED, PASSED, Verdict
from .run import Stage, by_status

NETS = ("resnet18-bfloat16-1", "resnet18-bfloat16-128")
ENGINES = ("eager", "eager-graph", "compile", "ours", "ours-graph", "ours-rf-graph")
USUAL = ("build", "smoke", "test", "sanitize", "tune", "bench")
NAMES = (*USUAL, "slow")
GPU_MARK = "mark.gpu"
MOST_NAMED = 60  # tests of each kind in the record
_SANITIZED, _LEFT_OUT = "sanitize.json", "left_out.jsonl"


def stages(out: Path, scratch: Path, python: str = sys.executable) -> list[Stage]:
    """All of them in order. out: where bench and tune leave their records."""
    module = (python, "-m")
    tune_file, spared = str(out / "tune.json"), str(scratch / _LEFT_OUT)
    pip = ("install", "--no-index", "--no-build-isolation", "--no-deps", "--editable", ".")
    pytest = ("pytest", "-q", "-p", "no:cacheprovider", "--durations=15", "--tb=short", "-m")
    watch = ("-p", "benchmarks.gpu_check.watched", "--watched", str(scratch))
    # Most of the time Triton compiles: tests are handed out one by one, or one worker gets all of a
    # kind that takes long. A worker that a kernel has hung or broken is replaced.
    workers = ("--numprocesses", str(min(os.cpu_count() or 1, 16)), "--max-worker-restart", "200")
    workers += ("--maxschedchunk", "1")
    if not find_spec("xdist"):
        workers = ()
    bench = (
        "--cases",
        ",".join(NETS),
        "--only",
        ",".join(ENGINES),
        "--no-layers",
        "--seconds",
        "3",
    )
    files = ("--json", str(out / "bench.json"), "--chart", str(out / "bench.png"))
    return [
        Stage(
            "build",
            [
                (*module, "pip", *pip),
                (*module, "benchmarks.gpu_check.built"),
            ],
            limit_s=140,
            judge=built,
            repeat=True,  # a machine of this kind may be another one
        ),
        Stage(
            "smoke",
            [(*module, "benchmarks.gpu_check.smoke", "--json", str(scratch / smoke.FILE))],
            limit_s=35,
            judge=smoked,
            log=False,
        ),
        Stage(
            "test",
            [(*module, *pytest, "gpu and not slow", *watch, *workers, *gpu_tests())],
            limit_s=105,
            judge=tested,
        ),
        Stage(
            "sanitize",
            [(*module, "benchmarks.gpu_check.sanitize", "--json", str(scratch / _SANITIZED))],
            limit_s=60,
            judge=sanitized,
        ),
        Stage(
            "tune",
            [(*module, "benchmarks.gpu_check.tuning", "--left-out", spared, *reversed(NETS))],
            limit_s=75,
            judge=tuned,
            env={"RESNET_FUSED_TUNE_FILE": tune_file},
            log=False,
        ),
        Stage(
            "bench",
            [(*module, "benchmarks.bench_gpu", *bench, *files)],
            limit_s=60,
            env={"RESNET_FUSED_TUNE_FILE": tune_file},
            log=False,
        ),
        Stage(
            "slow",
            [(*module, *pytest, "gpu and slow", *watch, *workers, *gpu_tests())],
            limit_s=400,
            judge=tested,
        ),
    ]


def gpu_tests(folder: Path = ROOT / "tests") -> list[str]:
    """The files with tests marked `gpu`: collecting all others takes pytest most of a minute."""
    files = folder.glob("test_*.py")
    return sorted(str(p) for p in files if p.match("test_gpu_*") or GPU_MARK in p.read_text())


def built(ended: Ended, scratch: Path) -> Verdict:
    """From what built.py prints: a kernel that cannot run here is a failure."""
    try:
        missing = json.loads(ended.log.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return by_status(ended, scratch)
    reasons = [f"{name}: {why}" for name, why in missing.items() if why]
    return Verdict(FAILED if reasons or ended.code else PASSED, "; ".join(reasons), missing)


def smoked(ended: Ended, scratch: Path) -> Verdict:
    """What smoke.py wrote, family by family."""
    verdict = by_status(ended, scratch)
    try:
        found = json.loads((scratch / smoke.FILE).read_text())
    except (OSError, ValueError):
        return Verdict(FAILED, f"no report, exit status {ended.code}")
    names: dict[str, list[str]] = {}
    for name, each in found.items():
        names.setdefault(each["outcome"], []).append(name)
    fine = names.pop("ok", [])
    others = (f"{outcome}: {', '.join(listed)}" for outcome, listed in sorted(names.items()))
    return Verdict(verdict.outcome, "; ".join((f"{len(fine)} ok", *others)), found)


def tested(ended: Ended, scratch: Path) -> Verdict:
    """By what the plugin wrote; tests that were all skipped have shown nothing."""
    try:
        found = watched.read(scratch, ended=ended.code is not None)
    except OSError:
        return Verdict(FAILED, f"pytest did not begin, exit status {ended.code}")
    count = found.counts()
    usual = ("passed", "failed", "skipped")
    text = ", ".join(f"{n} {outcome}" for outcome, n in count.items() if n or outcome in usual)
    fine = ended.code == 0 and count["passed"] > 0 and not any(count[bad] for bad in watched.BAD)
    # The worst first.
    named = {outcome: found.of(outcome) for outcome in reversed(watched.BAD) if count[outcome]}
    details = {outcome: dict(list(tests.items())[:MOST_NAMED]) for outcome, tests in named.items()}
    return Verdict(PASSED if fine else FAILED, text, {"count": count, **details})


def sanitized(ended: Ended, scratch: Path) -> Verdict:
    """What sanitize.py wrote, tool by tool."""
    verdict = by_status(ended, scratch)
    try:
        tools = json.loads((scratch / _SANITIZED).read_text())
    except (OSError, ValueError):
        return Verdict(FAILED, f"no report, exit status {ended.code}")
    text = ", ".join(f"{name} {found['outcome']}" for name, found in tools.items())
    return Verdict(verdict.outcome, text, tools)


def tuned(ended: Ended, scratch: Path) -> Verdict:
    """What tune had to do without has failed."""
    rows = left_out.read(scratch / _LEFT_OUT)
    names = sorted({row["candidate"] or row["convolution"] for row in rows})
    details = {f"{r['convolution']} {r['candidate']}": r["why"] for r in rows[:MOST_NAMED]}
    if rows:
        return Verdict(FAILED, f"{len(rows)} left out: {', '.join(names)}", details)
    return by_status(ended, scratch)
