"""The near end of `worker.py`: starts the process, asks it, ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .common import Unavailable, one_line
from .peers import Entrant, Job

PATIENCE_S = 300.0  # for one answer
ROOT = Path(__file__).parent.parent


class Worker:
    """An entrant's process; with `time`, what `interleave` takes. Use it as a context manager.

    Every method raises Unavailable, with the reason in one line, where the engine fails, and also
    where its process dies or gives no answer.
    """

    def __init__(self, entrant: Entrant, threads: int, log: Path):
        self.log = log
        self.failed = ""  # why, once a method has raised
        near, far = socket.socketpair()
        command = [sys.executable, "-m", "benchmarks.worker", entrant.module, str(far.fileno())]
        with far, log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                pass_fds=[far.fileno()],
                cwd=ROOT,  # where -m finds this package
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )
        self._connection = Connection(near.detach())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()  # the worker's recv ends, and with it the worker
        self._exit_code()

    def convert(self, job: Job) -> None:
        """Writes the net to the file that the engine reads."""
        self._ask("convert", job)

    def load(self, job: Job) -> tuple[Tensor, str]:
        """Logits of a first run (batch, classes), float32, and the settings in words."""
        logits, settings = self._ask("load", job)
        return torch.from_numpy(logits), settings

    def time(self, calls: int) -> float:
        """Seconds per call of that many calls in a row, measured over there."""
        return self._ask("time", calls)

    def _ask(self, verb: str, argument: object) -> Any:
        try:
            self._connection.send((verb, argument))
            if self._connection.poll(PATIENCE_S):
                good, answer = self._connection.recv()
            else:
                self._process.kill()
                good, answer = False, f"gave no answer within {PATIENCE_S:.0f} s"
        except (EOFError, ConnectionError):
            good, answer = False, self._end()
        if not good:
            self.failed = one_line(RuntimeError(answer))
            raise Unavailable(self.failed)
        return answer

    def _end(self) -> str:
        """How the process ended, with the last line that it wrote."""
        code = self._exit_code()
        how = f"ended with exit code {code}" if code >= 0 else f"died: {signal.strsignal(-code)}"
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}, {last}" if last else how

    def _exit_code(self) -> int:
        """Waits for the end, and brings it about where it does not come."""
        try:
            return self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
