"""Runs null_launches.py, whose process takes the CPU for a GPU."""

from __future__ import annotations

import null_device
import pytest
from own_process import run_tests_of

WHY_NOT = null_device.why_not()


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_what_a_gpu_would_be_asked_to_launch():
    run_tests_of("null_launches.py")
