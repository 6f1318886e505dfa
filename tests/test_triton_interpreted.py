"""Runs interpreted_triton.py, whose process needs Triton's interpreter from the start."""

from __future__ import annotations

import importlib.util

import pytest
from own_process import run_tests_of


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_in_the_interpreter():
    run_tests_of("interpreted_triton.py", TRITON_INTERPRET="1", RESNET_FUSED_DISABLE_EXT="1")
