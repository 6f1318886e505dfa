"""The environment variables that the package listens to, by name."""

from __future__ import annotations

import os
from collections.abc import Mapping

FORCE = "RESNET_FUSED_FORCE"  # a plan for every convolution, select.FORCES
EXACT_NONFINITE = "RESNET_FUSED_EXACT_NONFINITE"
TUNE_FILE = "RESNET_FUSED_TUNE_FILE"
ISA = "RESNET_FUSED_ISA"  # the widest instruction set on the CPU; csrc/cpu/isa.cpp reads it
DISABLE_EXT = "RESNET_FUSED_DISABLE_EXT"
_INTERPRET = "TRITON_INTERPRET"  # Triton's own


def is_set(name: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a switch is on: anything but nothing and "0" turns it on."""
    return environ.get(name, "0") not in ("", "0")


INTERPRETED = is_set(_INTERPRET)
"""Whether Triton interprets its kernels on the CPU, in this process from its start."""
