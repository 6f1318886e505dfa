"""The JSON that bench_engines writes: surroundings, versions, thresholds, one entry a case.

    {"when", "machine", "setup", "versions", "goals", "accuracy": [...], "cases": {name: {"model",
     "dtype", "batch", "when", "error_limit", "settings", "results": [...]}}}

Times are milliseconds per call, errors relative L2 norms of the logits against float64.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from .cases import Case
from .common import CHANNELS_LAST, GRANTED, Result, Samples, error_limit, machine
from .contest import Setup
from .goals import GOALS
from .peers import ENTRANTS, version
from .when import now

Record = dict[str, Any]
KEPT = ("when", "accuracy", "failed", "cases")  # of a record that is resumed


def new(setup: Setup) -> Record:
    packages = {name for e in ENTRANTS for name in e.packages + e.converts}
    return {
        "when": now(),
        "machine": machine().record(),
        "setup": {
            "threads": setup.threads,
            "size": setup.size,
            "seconds": setup.seconds,
            "rounds": setup.rounds,
            "rest_s": setup.rest_s,
        },
        "versions": {name: version(name) for name in sorted(packages, key=str.lower)},
        "goals": [dataclasses.asdict(goal) | {"case": str(goal.case)} for goal in GOALS],
        "accuracy": [],
        "cases": {},
    }


def case_entry(case: Case, results: list[Result], settings: Mapping[str, str]) -> Record:
    eager = next((r.error for r in results if r.engine == CHANNELS_LAST), None)
    return {
        **dataclasses.asdict(case),
        "when": now(),
        "error_limit": _limit(eager, getattr(torch, case.dtype)),
        "settings": dict(settings),
        "results": [r.record() for r in results],
    }


def results_of(entry: Mapping[str, Any]) -> list[Result]:
    """A case's results with samples that have the recorded median and quartiles."""
    results = []
    for row in entry["results"]:
        samples = None
        if "median_ms" in row:
            q1, median, q3 = (1e-3 * row[key] for key in ("q1_ms", "median_ms", "q3_ms"))
            samples = Samples((q1, q1, median, q3, q3))
        results.append(Result(row["engine"], row["batch"], samples, row["error"], row["reason"]))
    return results


def read(path: Path, maker: str = "bench_engines") -> Record:
    """Raises ValueError in one sentence for anything but a record like `maker`'s."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not (isinstance(record, dict) and record.keys() >= {"machine", "setup", "cases"}):
        raise ValueError(f"{path} must be a record of {maker}")
    return record


def write(path: Path, record: Record) -> None:
    """All or nothing: a run that is broken off leaves the last whole record."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(new, path)


def difference(
    old: Record,
    new: Record,
    machine: Sequence[str] = ("cpu", "isa_in_use", "package"),
    setup: Sequence[str] = ("threads", "size"),
) -> str:
    """What keeps the cases of two records from standing side by side, "" if nothing does.

    machine, setup: what must be equal of a record's parts of those names, beside the versions.
    """
    for key in machine:
        was, now_is = old["machine"].get(key), new["machine"].get(key)
        if was != now_is:
            return f"{key} {was}, not {now_is}"
    for key in setup:
        was, now_is = old["setup"].get(key), new["setup"].get(key)
        if was != now_is:
            return f"{key} {was}, not {now_is}"
    for name, there in old["versions"].items():
        if there != new["versions"].get(name):
            return f"{name} {there}, not {new['versions'].get(name)}"
    return ""


def resumed(
    path: Path,
    fresh: Record,
    read: Callable[[Path], Record],
    difference: Callable[[Record, Record], str],
) -> Record:
    """The record at `path`, under the surroundings of `fresh`, or `fresh` where there is none.

    Raises click.ClickException where it was measured otherwise.
    """
    if not path.exists():
        return fresh
    try:
        old = read(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if differs := difference(old, fresh):
        raise click.ClickException(f"--resume: {path} was measured with {differs}")
    return fresh | {key: old[key] for key in KEPT if key in old}


def _limit(eager: float | None, dtype: torch.dtype) -> float | None:
    """What the fused net's error may be; None in 16 bits without eager's to hold it against: a net
    rounds more often than what is granted allows for.
    """
    if eager is None:
        return GRANTED[dtype] if dtype == torch.float32 else None
    return error_limit(eager, dtype)
