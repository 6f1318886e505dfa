"""What a record of a GPU must name: python -m benchmarks.gpu_check.facts prints it as JSON.

In a process of its own, so that whoever asks holds no memory of the GPU and outlives a broken
torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("resnet_fused", "csrc", "benchmarks", "tests")
COMMIT = "GPU_CHECK_COMMIT"
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh")


def facts() -> dict[str, Any]:
    """GPU, driver, versions and commit. "gpu" is None where torch sees none, "why" says why."""
    return {**software(), **gpu()}


def software(root: Path = ROOT) -> dict[str, Any]:
    return {"commit": commit(root), "sources": sources(root), "nvcc": nvcc()}


def gpu() -> dict[str, Any]:
    import torch

    from resnet_fused import _gpuinfo

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "triton": _gpuinfo.triton_version(),
        "gpu": None,
    }
    if torch.version.cuda is None:
        return found | {"why": "torch was built without CUDA"}
    if not torch.cuda.is_available():
        return found | {"why": "torch finds no GPU"}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "gpu": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _gpuinfo.driver_version(),
    }


def commit(root: Path = ROOT) -> str:
    """The commit, with " and changes" behind it where files differ.

    Without git what the environment variable GPU_CHECK_COMMIT says, else "unknown".
    """
    try:
        head = _output(["git", "rev-parse", "HEAD"], root)
        changes = _output(["git", "status", "--porcelain", "--untracked-files=no"], root)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(COMMIT) or "unknown"
    return f"{head} and changes" if changes else head


def sources(root: Path = ROOT) -> str:
    """Twelve digits that change with any source file, for copies that have no git."""
    digest = hashlib.sha256()
    found = [*root.glob("*"), *(path for name in SOURCES for path in (root / name).rglob("*"))]
    for path in sorted(path for path in found if path.suffix in SUFFIXES):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def nvcc() -> str:
    """The compiler's version, "none" where it is not on PATH."""
    try:
        text = _output(["nvcc", "--version"], ROOT)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return next((line.rpartition("V")[2] for line in text.splitlines() if " V" in line), "unknown")


def _output(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


if __name__ == "__main__":
    print(json.dumps(facts()))
