"""`make sanitize` sees what it should: planted faults end in a report, no access is hidden from it.

The faults (csrc/sanitize/faults.cpp) exist in sanitized builds only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ISAS

import resnet_fused  # noqa: F401  (registers the ops)

pytestmark = [pytest.mark.kernels, pytest.mark.threads]

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SANITIZER = (
    torch.ops.resnet_fused_sanitize.sanitizer()
    if hasattr(torch.ops.resnet_fused_sanitize, "sanitizer")
    else ""
)

MEMORY = r"AddressSanitizer: (heap-buffer-overflow|unknown-crash|use-after-poison)"
FAULTS = {
    "address": {
        "read": MEMORY,
        "write": MEMORY,
        "masked_read": MEMORY,
        "masked_write": MEMORY,
        "masked_read_16": MEMORY,
        "masked_write_16": MEMORY,
        "direct_read": MEMORY,
        "direct_write": MEMORY,
        "winograd_read": MEMORY,
        "winograd_write": MEMORY,
        "scratch": MEMORY,
        "overflow": "signed integer overflow",
        "shift": "shift exponent",
    },
    "thread": {"race": "ThreadSanitizer: data race"},
    "": {},
}

PLANT = """
import sys, torch, resnet_fused
torch.set_num_threads(2)
torch.ops.resnet_fused.set_cpu_isa(sys.argv[1])
torch.ops.resnet_fused_sanitize.plant(sys.argv[2])
print("survived")
"""


def plant(isa, fault):
    command = [sys.executable, "-c", PLANT, isa, fault]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_build_is_the_one_that_was_asked_for():
    """`make sanitize` runs sanitized kernels, everything else ordinary ones."""
    asked = os.environ.get("RESNET_FUSED_SANITIZED", "")
    assert asked == SANITIZER


@pytest.mark.skipif(not SANITIZER, reason="an ordinary build: make sanitize runs this")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fault", FAULTS[SANITIZER])
def test_a_planted_fault_is_reported(fault, isa):
    done = plant(isa, fault)
    assert done.returncode != 0
    assert re.search(FAULTS[SANITIZER][fault], done.stderr), done.stderr


@pytest.mark.skipif(not SANITIZER, reason="an ordinary build: make sanitize runs this")
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_reported_without_a_fault(isa):
    done = plant(isa, "none")
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr


def test_no_vector_access_is_hidden():
    """gcc checks plain vector accesses only: every other kind in use is announced by hand."""
    source = "".join(path.read_text() for path in sorted((CSRC / "cpu").glob("*.*")))
    kinds = "mask\\w*load mask\\w*store maskmove gather scatter stream lddqu mask\\w*compress"
    kinds += " mask\\w*expand mask\\w*cvt\\w*_store broadcast_s[sd] loadd"
    hidden = rf"\b_(?:mm\d*|tile)_\w*(?:{kinds.replace(' ', '|')})\w*"
    used = set(re.findall(hidden, source))
    assert "_mm512_maskz_loadu_ps" in used, "the kernels' tails are masked"
    announced = re.findall(r"#define (_mm\w+)", (CSRC / "sanitize" / "intrinsics.h").read_text())
    assert used <= set(announced), "a gap in csrc/sanitize/intrinsics.h"
