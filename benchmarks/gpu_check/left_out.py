"""A file of candidates that tune must do without, one a line:

    {"convolution", "candidate", "why", "fatal"}

Written by several processes, any of which may end at any time. candidate: "" where it is not known
which. fatal: it has cost a process.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

MOST_FATAL = 2  # of a candidate, on different convolutions: then it is not tried on any other


def add(path: Path, convolution: str, candidate: str, why: str, *, fatal: bool = False) -> None:
    row = {"convolution": convolution, "candidate": candidate, "why": why[:300], "fatal": fatal}
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, f"{json.dumps(row)}\n".encode())  # at once: others write, too
    finally:
        os.close(file)


def read(path: Path) -> list[dict]:
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def avoided(path: Path, convolution: str) -> set[str]:
    """Candidates that are not to be tried on a convolution."""
    rows = read(path)
    fatal = Counter(row["candidate"] for row in rows if row["fatal"])
    here = {row["candidate"] for row in rows if row["convolution"] == convolution}
    return here | {name for name, times in fatal.items() if times >= MOST_FATAL}
