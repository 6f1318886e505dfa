"""Commands with a time limit, their output kept in a file: a stage of gpu_check."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MOST_LOG_BYTES = 200_000


@dataclass(frozen=True)
class Stage:
    """commands: one after another, each whatever became of the last. limit_s: for all together.

    refusals: what a command's output says where the machine does not let it do its work: then it is
    neither passed nor failed. environ: variables besides those of this process.
    """

    commands: tuple[Sequence[str], ...]
    limit_s: float
    refusals: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """status: "passed", "failed", "timed out" or "unavailable"; reason: why it did not pass."""

    status: str
    seconds: float
    reason: str = ""


def run(stage: Stage, log: Path, folder: Path, scale: float = 1.0) -> Outcome:
    """Runs the stage's commands in `folder`; the end of what they print is in `log` at any end."""
    start = time.monotonic()
    deadline = start + stage.limit_s * scale
    worst, reasons, printed = "passed", [], b""
    for command in stage.commands:
        found, output = _run(stage, command, folder, deadline)
        printed += b"$ " + " ".join(command).encode() + b"\n" + output
        log.write_bytes(printed[-MOST_LOG_BYTES:])
        if found.status != "passed":
            reasons.append(found.reason)
            worst = max(worst, found.status, key=_SEVERITY.index)
    return Outcome(worst, round(time.monotonic() - start, 1), "; ".join(reasons))


_SEVERITY = ("passed", "unavailable", "timed out", "failed")


def _run(
    stage: Stage, command: Sequence[str], folder: Path, deadline: float
) -> tuple[Outcome, bytes]:
    name = _name(command)
    left = deadline - time.monotonic()
    if left <= 0:
        return Outcome("timed out", 0, f"no time was left for {name}"), b""
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **stage.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Outcome("unavailable", 0, f"{name} cannot be run: {error.strerror}"), b""
    try:
        output, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        output, _ = process.communicate()
        return Outcome("timed out", 0, f"{name} was ended at the stage's limit"), output
    text = output.decode(errors="replace")
    refused = next((words for words in stage.refusals if words in text), None)
    if refused is not None:
        return Outcome("unavailable", 0, f"{name}: this machine refuses it: {refused}"), output
    if process.returncode != 0:
        return Outcome("failed", 0, f"{name}: exit status {process.returncode}"), output
    return Outcome("passed", 0), output


def _name(command: Sequence[str]) -> str:
    """What a reader calls it: the program, or its module, or a sanitizer's tool."""
    words = list(command)
    for option in ("--tool", "-m"):
        if option in words[:-1]:
            return words[words.index(option) + 1]
    return Path(words[0]).name
