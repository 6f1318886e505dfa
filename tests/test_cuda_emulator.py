"""The emulator of CUDA by itself: its primitives against their definitions, and each detector on a
kernel of a few lines (csrc/cuda/emulate/selftest.cpp)."""

from __future__ import annotations

import pytest
from emulated_sm90 import CSRC, ROOT, build_library, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_primitives_and_detectors(capfd):
    library = build_library(ROOT / "build" / "emulated", "selftest", CSRC, ["emulate/selftest"], [])
    wrong = library.emulator_selftest()
    assert not wrong, capfd.readouterr().out
