"""What a record of a GPU must name: the GPU, the driver, the versions, the commit."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from resnet_fused._gpuinfo import driver_version, triton_version
from resnet_fused._version import __version__


def collect(root: Path) -> dict[str, Any]:
    """Of the current GPU, None where there is none; root: of the repository."""
    there = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if there else None,
        "driver": driver_version() if there else None,
        "capability": list(torch.cuda.get_device_capability()) if there else None,
        "multiprocessors": (
            torch.cuda.get_device_properties(0).multi_processor_count if there else None
        ),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version(),
        "nvcc": _first_line(["nvcc", "--version"], "release"),
        "resnet-fused": __version__,
        "commit": _commit(root),
        "when": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }


def _commit(root: Path) -> str | None:
    """The commit, with "+changes" where the tree is not clean; None outside a repository."""
    found = _first_line(["git", "-C", str(root), "rev-parse", "HEAD"], "")
    if found is None:
        return None
    changed = _first_line(["git", "-C", str(root), "status", "--porcelain"], "")
    return f"{found}+changes" if changed else found


def _first_line(command: list[str], word: str) -> str | None:
    """The first line of what a program prints that holds a word; None where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    if done.returncode != 0:
        return None
    return next((line.strip() for line in done.stdout.splitlines() if word in line), None)
