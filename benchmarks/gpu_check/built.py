"""Which kernels can run here: prints {"cpu": why not, "cuda": ..., "triton": ...} on one line.

Exit status 1 where one cannot.
"""

from __future__ import annotations

import json
import sys

import torch

from resnet_fused import backends


def missing() -> dict[str, str]:
    """Kernel -> why it cannot run on this machine, "" where it can."""
    plans = {"cpu": ("direct", "cpu"), "cuda": ("cuda", "cuda"), "triton": ("triton", "cuda")}
    return {name: backends.missing(*plan) for name, plan in plans.items()}


if __name__ == "__main__":
    print(f"torch {torch.__version__}")
    found = missing()
    print(json.dumps(found))
    sys.exit(any(found.values()))
