"""A command with a time limit: it ends with all its children, and what it printed is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Between asking to end and ending: pytest-xdist waits for its workers for 10 s before it reports.
GRACE_S = 15.0
LAST_WORDS_S = 2.0  # in which Python prints where it hangs


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit status, negative for a signal, None past the limit."""

    code: int | None
    seconds: float
    log: str

    @property
    def tail(self) -> str:
        """The last lines that it printed."""
        return "\n".join(self.log.splitlines()[-30:])


def run(
    command: Sequence[str],
    log: Path,
    limit_s: float,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Ended:
    """Runs a command for `limit_s` seconds at most, its output in the file `log`.

    env: variables beside this process's. A command that cannot be started has status 127.
    """
    start = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env={**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # compilers and workers end with it
            )
        except OSError as error:
            output.write(f"{command[0]}: {error.strerror}\n".encode())
            process = None
        code: int | None = 127
        if process is not None:
            try:
                code = process.wait(max(limit_s, 0))
            except subprocess.TimeoutExpired:
                code = None
            finally:  # also where this process is interrupted
                _end(process)
    return Ended(code, time.monotonic() - start, log.read_text(errors="replace"))


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of a command's process group: asks like Ctrl-C, at which pytest tells what
    it has found so far, then for the stacks of Python that hangs in a kernel, then insists."""
    signs = ((signal.SIGINT, GRACE_S), (signal.SIGABRT, LAST_WORDS_S), (signal.SIGKILL, None))
    for sign, patience in signs:
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
