"""Runs a file of tests in a process of its own, which needs to be another one from the start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_tests_of(name: str, **environ: str) -> None:
    """All tests of the file `name` in this folder must pass, with `environ` besides."""
    path = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
