"""compute-sanitizer's four tools over every GPU kernel: python -m benchmarks.gpu_check.sanitize

A tool's outcome is

    clean        it watched all calls to their end and reported nothing, and on this machine it did
                 report a fault that was planted for it
    errors       it reported something, or an answer was wrong
    unproved     it reported nothing, but the planted fault neither
    unavailable  it is not installed, or the machine refuses it
    out of time  the calls did not come to their end

Memory comes from the driver call by call, so that what lies behind a tensor is no other tensor.
Exit status 0: all clean; 1: errors; 3: no errors, but not all clean.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from . import command, faults
from .facts import ROOT
from .run import SECONDS

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CLEAN, ERRORS, UNPROVED = "clean", "errors", "unproved"
UNAVAILABLE, OUT_OF_TIME = "unavailable", "out of time"
SANITIZER = "compute-sanitizer"
PLANTED = Path(__file__).with_name("planted.cu")
CALLS = (sys.executable, "-m", "benchmarks.gpu_check.ops_once")
ENV = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
FIRST_S = 15.0  # for a call without a tool: one that hangs is named and leaves time for the tools
STATUS = 86  # which --error-exitcode asks for
# Kernels are in question, torch probes what may fail; importing it under a tool takes its time.
OPTIONS = ("--report-api-errors", "no", "--launch-timeout", "60")
# "========= ERROR SUMMARY: 0 errors", "========= RACECHECK SUMMARY: 2 hazards displayed (...)"
SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) ", re.MULTILINE)
# The tool's own words, with which it ends before anything was watched.
REFUSED = re.compile(
    r"^=+ ((?:Device not supported|Failed to initialize|Error: (?!process)).*)$",
    re.MULTILINE | re.IGNORECASE,
)
DONE = re.compile(r"^\d+ calls, 0 wrong$", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    """What one tool has shown."""

    outcome: str
    why: str = ""
    reports: int | None = None
    seconds: float = 0.0


def judge(ended: command.Ended, planted: command.Ended | None) -> Found:
    """From what a tool printed over all calls, and over its planted fault (None: not compiled)."""
    counts = [int(count) for count in SUMMARY.findall(ended.log)]
    reports = sum(counts) if counts else None
    # First: a machine that refuses lets calls fail, which are reported as well.
    if refused := REFUSED.search(ended.log):
        return Found(UNAVAILABLE, refused[1].strip(), reports, ended.seconds)
    if reports:
        return Found(ERRORS, f"{reports} reports", reports, ended.seconds)
    if ended.code is None:
        why = f"after {ended.seconds:.0f} s, in {faults.last_announced(ended.log) or 'no call'}"
        return Found(OUT_OF_TIME, why, reports, ended.seconds)
    if ended.code == 127:
        return Found(UNAVAILABLE, ended.tail, None, ended.seconds)
    if reports is None:
        return Found(UNAVAILABLE, f"no summary, exit status {ended.code}", None, ended.seconds)
    if ended.code != 0 or not DONE.search(ended.log):
        why = f"the calls ended with status {ended.code}"
        return Found(ERRORS, why, reports, ended.seconds)
    if planted is None:
        return Found(UNPROVED, "the planted faults were not compiled", reports, ended.seconds)
    if not sum(int(count) for count in SUMMARY.findall(planted.log)):
        return Found(UNPROVED, "the planted fault was not reported", reports, ended.seconds)
    return Found(CLEAN, "", reports, ended.seconds)


def exit_code(found: Mapping[str, Found]) -> int:
    outcomes = {each.outcome for each in found.values()}
    if ERRORS in outcomes:
        return 1
    return 0 if outcomes == {CLEAN} else 3


def watch(
    tool: str, sanitizer: str, planted: Path | None, folder: Path, limit_s: float
) -> tuple[Found, str]:
    """One tool over its planted fault and over the calls, and all that it printed."""
    start = time.monotonic()
    words = [sanitizer, "--tool", tool, "--error-exitcode", str(STATUS), *OPTIONS]
    log, seen = folder / f"{tool}.log", None
    if planted is not None:
        seen = command.run([*words, str(planted), tool], log, limit_s / 3)
    left = limit_s - (time.monotonic() - start)
    ended = command.run([*words, *CALLS], log, left, cwd=ROOT, env=ENV)
    text = f"---- {tool}, planted\n{seen.tail if seen else 'not compiled'}\n"
    return judge(ended, seen), f"{text}---- {tool}, all calls\n{ended.log}"


def compile_planted(folder: Path, limit_s: float, compiler: str = "nvcc") -> Path | None:
    program = folder / "planted"
    words = [compiler, "-lineinfo", "-o", str(program), str(PLANTED)]
    done = command.run(words, folder / "nvcc.log", limit_s)
    print(done.log, end="")
    return program if done.code == 0 else None


def find_sanitizer() -> str | None:
    """On PATH, or where toolkits have it: beside nvcc, in CUDA_HOME or its usual place."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders.append(Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin"))
    able = (shutil.which(SANITIZER, path=str(folder)) for folder in folders)
    return shutil.which(SANITIZER) or next(filter(None, able), None)


@click.command()
@click.option("--tools", multiple=True, type=click.Choice(TOOLS), default=TOOLS)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=70.0, envvar=SECONDS, show_envvar=True
)
def main(tools: Sequence[str], path: Path | None, seconds: float) -> None:
    """Watch every kernel with compute-sanitizer; the tools run side by side."""
    end = time.monotonic() + seconds
    sanitizer = find_sanitizer()
    if sanitizer is None:
        found = {tool: Found(UNAVAILABLE, f"{SANITIZER} is not installed") for tool in tools}
        _write(path, found)
        sys.exit(_conclude(found))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = compile_planted(folder, seconds / 4)
        # Once without a tool: Triton compiles, and what is wrong anyway shows.
        words = (*CALLS, "--each", str(FIRST_S))
        first = command.run(words, folder / "calls.log", end - time.monotonic(), cwd=ROOT)
        print(first.log, end="", flush=True)
        left = end - time.monotonic()
        with ThreadPoolExecutor(len(tools)) as pool:
            asked = {
                tool: pool.submit(watch, tool, sanitizer, planted, folder, left) for tool in tools
            }
            found = {}
            for tool, future in asked.items():
                found[tool], text = future.result()
                print(text, flush=True)
                _write(path, found)
    sys.exit(_conclude(found))


def _write(path: Path | None, found: Mapping[str, Found]) -> None:
    if path is not None:
        path.write_text(json.dumps({tool: asdict(each) for tool, each in found.items()}) + "\n")


def _conclude(found: Mapping[str, Found]) -> int:
    for tool, each in found.items():
        print(f"{tool}: {each.outcome}{f', {each.why}' if each.why else ''}")
    return exit_code(found)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check.sanitize")
