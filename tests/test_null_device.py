"""Runs null_launches.py, whose process takes the CPU for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import null_device
import pytest


@pytest.mark.slow
@pytest.mark.skipif(null_device.why_not() is not None, reason=str(null_device.why_not()))
def test_what_a_gpu_would_be_asked_to_launch():
    path = Path(__file__).with_name("null_launches.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
