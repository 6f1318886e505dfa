"""summary.json and summary.md: what a run of gpu-check found, rewritten as each stage ends.

    {"when", "facts": {...}, "total_s", "stages": {name: {"outcome", "why", "seconds", "limit_s",
     "when", "details": {...}, "tail"}}}

outcome: "passed", "failed", "out of time", or "incomplete" where nothing is wrong but not all could
be done. The facts are those of facts.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..when import now

PASSED, FAILED, OUT_OF_TIME, INCOMPLETE = "passed", "failed", "out of time", "incomplete"
# What makes two runs the same work on the same machine.
SAME = ("gpu", "driver", "torch", "cuda", "triton", "nvcc", "sources")
JSON, MARKDOWN = "summary.json", "summary.md"

Record = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What became of a stage. details: for the record, by name."""

    outcome: str
    why: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def new(facts: Mapping[str, Any], total_s: float) -> Record:
    return {"when": now(), "facts": dict(facts), "total_s": total_s, "stages": {}}


def entry(verdict: Verdict, seconds: float, limit_s: float, tail: str) -> Record:
    return {
        **asdict(verdict),
        "seconds": round(seconds, 1),
        "limit_s": round(limit_s, 1),
        "when": now(),
        "tail": tail,
    }


def resumed(folder: Path, fresh: Record) -> Record:
    """`fresh` with the stages that have passed in `folder` if it is about the same work."""
    try:
        old = json.loads((folder / JSON).read_text())
        same = all(old["facts"].get(key) == fresh["facts"].get(key) for key in SAME)
        passed = {n: s for n, s in old["stages"].items() if s["outcome"] == PASSED} if same else {}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return fresh
    return fresh | {"stages": passed}


def write(folder: Path, record: Record) -> None:
    """Both files, each all or nothing."""
    for name, text in ((JSON, json.dumps(record, indent=2) + "\n"), (MARKDOWN, markdown(record))):
        part = folder / f"{name}.new"
        part.write_text(text)
        os.replace(part, folder / name)


def exit_code(record: Record, asked: tuple[str, ...]) -> int:
    """0: all that was asked for passed; 1: something failed; 3: nothing did, not all was done."""
    outcomes = {record["stages"].get(name, {}).get("outcome", INCOMPLETE) for name in asked}
    if outcomes & {FAILED, OUT_OF_TIME}:
        return 1
    return 3 if INCOMPLETE in outcomes else 0


def markdown(record: Record) -> str:
    about = record["facts"]
    lines = [f"# gpu-check: {about.get('gpu') or 'no GPU'}", ""]
    lines += [f"* {key}: {value}" for key, value in about.items()]
    lines += ["", "| stage | outcome | seconds | of | |", "|---|---|---|---|---|"]
    for name, stage in record["stages"].items():
        numbers = f"{stage['seconds']:g} | {stage['limit_s']:g}"
        lines.append(f"| {name} | {stage['outcome']} | {numbers} | {_cell(stage['why'])} |")
    for name, stage in record["stages"].items():
        lines += ["", f"## {name}", ""]
        lines += [f"* {key}: {_cell(_text(value))}" for key, value in stage["details"].items()]
        lines += ["", "```", stage["tail"].replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
