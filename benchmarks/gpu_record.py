"""The JSON that bench_gpu writes: surroundings, versions, how it was timed, one entry a case.

    {"when", "machine": {..., "gpu", "driver", "commit", "sources"}, "setup", "method", "versions",
     "failed": {name: why},
     "cases": {name: {"model", "dtype", "batch", "when", "error_limit", "ceilings", "floor_ms",
     "multiplications", "results": [...], "layers": [...], "failures": [...]}}}

Times are milliseconds per call of nets, microseconds of layers; errors relative L2 norms against
float64. A dry run has no times.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from resnet_fused import _gpuinfo
from resnet_fused.triton_kernels.device import device_of

from .common import machine
from .gpu_contest import Setup
from .gpu_engines import INPUTS
from .gpu_layers import MOST_INPUTS
from .peers import version
from .record import Record, now

MAKER = "bench_gpu"
PACKAGES = ("torch", "triton", "jax", "jaxlib")
SAME_MACHINE = ("gpu", "driver", "package", "sources")
SOURCES = ("resnet_fused", "csrc")
SAME_SETUP = ("dry_run", "size", "layers", "engines")

METHOD = {
    "timing": "medians over interleaved rounds of event-timed samples; CUDA graphs of 10 calls or "
    "more but for 'eager channels_last', 'fused' and 'fused + rf.graph', which are timed call by "
    "call, and JAX, whose rows of calls with the same images the host's clock times",
    "l2_nets": f"equal images from {INPUTS} addresses take turns; weights and activations stay in "
    "L2 where they fit, as in repeated inference",
    "l2_layers": f"inputs and residuals from up to {MOST_INPUTS} addresses, beyond L2 twice where "
    "so many suffice, take turns; weights and outputs stay in L2 where they fit",
    "floor": "sum over steps of the longer of multiply-adds at the speed of the matrix product and "
    "bytes at the speed of the copy, both measured before the case; see benchmarks/roofline.py",
}


def new(setup: Setup) -> Record:
    return {
        "when": now(),
        "machine": machine().record() | _gpu(setup),
        "setup": setup.record(),
        "method": METHOD,
        "versions": _versions(),
        "failed": {},
        "cases": {},
    }


def _gpu(setup: Setup) -> dict[str, Any]:
    """What of the GPU and the code the numbers depend on."""
    about: dict[str, Any] = {"driver": None, "l2_bytes": None} | sources()
    if not setup.dry_run:
        device = device_of(torch.cuda.current_device())
        about |= {"driver": _gpuinfo.driver_version(), "l2_bytes": device.l2_bytes}
        about |= {"capability": list(device.capability), "multiprocessors": device.multiprocessors}
    return about


def _versions() -> dict[str, str | None]:
    versions = {name: version(name) for name in PACKAGES}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return versions | {"cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}


def sources() -> dict[str, str | None]:
    """commit: of this checkout. sources: a hash of the package's code there, with "+" behind it
    where files differ; so that a record can go on under a later commit of the same code.

    Both are None outside a checkout.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        found = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True, env=quiet
        )
        return found.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        trees = git("rev-parse", *(f"HEAD:{folder}" for folder in SOURCES)).split()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "sources": None}
    digest = hashlib.sha256(" ".join(trees).encode()).hexdigest()[:12]
    return {"commit": commit, "sources": digest + ("+" if changed else "")}
