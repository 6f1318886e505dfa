"""How a kernel that hangs or faults is noticed from inside its process."""

from __future__ import annotations

import faulthandler
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

TIMEOUT = re.compile(r"^Timeout \(", re.MULTILINE)  # the first words of faulthandler's report
BROKEN = 4  # exit status of whoever stops because the GPU cannot be used any more
_ANNOUNCED = re.compile(r"^> (.*)$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*?)", line (\d+) in (\S+)', re.MULTILINE)


def broken() -> str:
    """Why this process can no longer use the GPU, "" where it can.

    After an illegal access or a failed launch every later call of CUDA fails, in this process only.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def end_in(seconds: float, file: IO[str] = sys.stderr) -> None:
    """Ends this process with status 1 after that time, unless it is called again or `cancel` is.

    First every thread's stack goes to the file. Needs no Python to run: who waits for a kernel that
    hangs may hold the interpreter's lock.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=file)


cancel = faulthandler.cancel_dump_traceback_later


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """`end_in` for a block; 0 for no limit."""
    if seconds:
        end_in(seconds)
    try:
        yield
    finally:
        cancel()


def announce(what: str) -> None:
    """Prints what runs next, so that it is known where the process does not come back from it."""
    print(f"> {what}", flush=True)


def last_announced(log: str) -> str:
    return (_ANNOUNCED.findall(log) or [""])[-1]


def where(stacks: str) -> str:
    """The innermost calls of the main thread, which faulthandler prints last."""
    frames = _FRAME.findall(re.split(r"^(?:Current thread|Thread) ", stacks, flags=re.M)[-1])
    short = [f"{name} ({file.rpartition('/')[2]}:{line})" for file, line, name in frames[:3]]
    return " < ".join(short)
