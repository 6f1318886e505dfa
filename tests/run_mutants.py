"""`make mutants`: plants every bug of planted_*.py and counts those that the emulation shows.

Each bug runs in a process of its own, since it may crash or hang. The list is printed; the exit
status says whether at least 95% showed.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from pathlib import Path

import torch

KERNELS = ("planted_sm80", "planted_stem", "planted_stem90", "planted_tail", "planted_sm90")
LEAST_SHARE = 0.95
TIMEOUT_S = 60.0


def _show(planted, library, number: int, sweep: list, answer) -> None:
    answer.send(planted.show(library, number, sweep))


def show(planted, library, number: int, sweep: list) -> str:
    """What shows the bug, in words: the emulator's, a difference, a crash or a hang; or nothing."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=_show, args=(planted, library, number, sweep, send))
    child.start()
    send.close()
    try:
        return receive.recv() if receive.poll(TIMEOUT_S) else "it hangs"
    except EOFError:
        child.join()
        return f"it crashes with status {child.exitcode}"
    finally:
        child.kill()
        child.join()


def run(name: str, folder: Path, pattern: str) -> tuple[int, int]:
    """Bugs that showed, and all of one kernel whose names contain `pattern`."""
    planted = importlib.import_module(name)
    sweep = planted.cases()
    for data, *_ in sweep:  # once, for all processes
        _ = data.oracle, data.magnitude
    bugs = [bug for bug in planted.BUGS if pattern in bug.name]
    caught = 0
    for round_ in planted.rounds(bugs):
        library = planted.build_planted(folder, round_)
        for number, bug in enumerate([None, *round_]):
            shown = show(planted, library, number, sweep)
            if bug is None:
                if shown:
                    sys.exit(f"{name}: without a bug it shows {shown}")
                continue
            caught += bool(shown)
            mark = "shown   " if shown else "SURVIVED"
            print(f"{mark} {bug.name}: {shown}", flush=True)
    return caught, len(bugs)


def main() -> None:
    torch.set_num_threads(1)
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    start, folder = time.monotonic(), Path(__file__).resolve().parent.parent / "build" / "emulated"
    total = [run(name, folder, pattern) for name in KERNELS]
    for name, (caught, count) in zip(KERNELS, total, strict=True):
        print(f"{name}: {caught} of {count} bugs shown")
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(sum(c for c, _ in total) < LEAST_SHARE * sum(n for _, n in total))


if __name__ == "__main__":
    main()
