"""Everything that a GPU proves, in one command:

    make gpu-check STAGES=build,test,sanitize,tune,bench OUT=folder

For a machine that has torch with CUDA, Triton and nvcc; nothing is fetched from the network. Every
stage has a time limit, later stages run whatever became of earlier ones, and what is known is
written when a stage ends: `check.json` with the GPU, the versions and each stage's outcome, a log
for each stage, and the records of `tune` and `bench`. With the default stages at most 8 minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from . import gpu_facts
from .stages import Outcome, Stage, run

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-m"]
BENCH_CASES = "resnet18-bfloat16-1,resnet18-bfloat16-128"
BENCH_PEERS = "eager,eager-graph,compile,ours,ours-graph"
# Reads of memory that another kernel has not written, races, barriers, and what is never set.
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# What compute-sanitizer says where it may not watch the device.
REFUSALS = (
    "Device not supported",
    "not permitted",
    "Unable to initialize",
    "insufficient privileges",
    "Failed to initialize",
)


def stages(out: Path) -> dict[str, Stage]:
    """The stages in their order; seconds add up to less than 8 minutes."""
    install = ["pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    pytest = ["pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    tune = ["resnet_fused.cli", "tune", "--device", "cuda", "--dtype", "bfloat16"]
    tune += ["--batch", "128", "--seconds", "0.1"]
    bench = ["benchmarks.bench_gpu", "--cases", BENCH_CASES, "--only", BENCH_PEERS]
    bench += ["--seconds", "5", "--json", str(out / "bench.json")]
    return {
        "build": Stage(([*PYTHON, *install],), 150),
        "test": Stage(([*PYTHON, *pytest],), 120),
        "sanitize": Stage(tuple(map(_sanitize, SANITIZERS)), 70, refusals=REFUSALS),
        "tune": Stage(
            ([*PYTHON, *tune],), 60, environ={"RESNET_FUSED_TUNE_FILE": str(out / "tuning.json")}
        ),
        "bench": Stage(([*PYTHON, *bench],), 70),
    }


def _sanitize(tool: str) -> list[str]:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ["--tool", tool, "--error-exitcode", "9", "--launch-timeout", "60"]
    return [found, *options, *PYTHON, "benchmarks.gpu_calls"]


@click.command()
@click.option(
    "--stages", "names", default="build,test,sanitize,tune,bench", help="Which, in order."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--scale", type=click.FloatRange(min=0), default=1.0, help="Of the time limits.")
def main(names: str, out: Path, scale: float) -> None:
    """Builds, tests, sanitizes, tunes and times on the GPU at hand; writes records to OUT."""
    out = out.resolve()
    known = stages(out)
    chosen = [name for name in names.split(",") if name]
    for name in chosen:
        if name not in known:
            raise click.BadParameter(
                f"must be among {', '.join(known)}, got {name}", param_hint="--stages"
            )
    out.mkdir(parents=True, exist_ok=True)
    raise SystemExit(check({name: known[name] for name in chosen}, out, scale))


def check(chosen: dict[str, Stage], out: Path, scale: float = 1.0) -> int:
    """Runs the stages; 0 where all passed, 1 where one failed or could not be run."""
    outcomes: dict[str, Outcome] = {}
    facts = gpu_facts.collect(ROOT)
    _write(out, facts, outcomes)
    console = Console(stderr=True)
    for name, stage in chosen.items():
        console.print(f"{name}: at most {stage.limit_s * scale:.0f} s", highlight=False)
        outcomes[name] = run(stage, out / f"{name}.log", ROOT, scale)
        _write(out, facts, outcomes)
        console.print(f"{name}: {outcomes[name].status}, {outcomes[name].seconds:.0f} s")
    Console().print(table(outcomes))
    return 0 if all(outcome.status == "passed" for outcome in outcomes.values()) else 1


def table(outcomes: dict[str, Outcome]) -> Table:
    grid = Table("stage", "outcome", "seconds", "why")
    for name, outcome in outcomes.items():
        grid.add_row(name, outcome.status, f"{outcome.seconds:.0f}", outcome.reason)
    return grid


def _write(out: Path, facts: dict, outcomes: dict[str, Outcome]) -> None:
    """Whole at every moment: a machine may be taken away."""
    record = {"machine": facts, "stages": {name: vars(o) for name, o in outcomes.items()}}
    fresh = out / ".check.json"
    fresh.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(fresh, out / "check.json")


if __name__ == "__main__":
    main()
