"""The JSON that bench_gpu writes: surroundings, versions, how it was timed, one entry a case.

    {"when", "machine": {..., "gpu", "driver", "commit", "sources"}, "setup", "method", "versions",
     "failed": {name: why},
     "cases": {name: {"model", "dtype", "batch", "when", "error_limit", "ceilings", "floor_ms",
     "multiplications", "selection", "results": [...], "layers": [...], "failures": [...]}}}

Times are milliseconds per call of nets, microseconds of layers; errors relative L2 norms against
float64. A dry run has no times.
"""

from __future__ import annotations

from typing import Any

import torch

from resnet_fused import _gpuinfo
from resnet_fused.triton_kernels.device import device_of

from .common import machine
from .gpu_check import facts
from .gpu_contest import Setup
from .gpu_engines import INPUTS
from .gpu_layers import MOST_INPUTS
from .peers import version
from .record import Record, now

MAKER = "bench_gpu"
PACKAGES = ("torch", "triton", "jax", "jaxlib")
SAME_MACHINE = ("gpu", "driver", "package", "sources")
# A record goes on under a later commit of the same package.
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
    about: dict[str, Any] = {
        "driver": None,
        "l2_bytes": None,
        "commit": facts.commit(),
        "sources": facts.sources(folders=SOURCES),
    }
    if not setup.dry_run:
        device = device_of(torch.cuda.current_device())
        about |= {"driver": _gpuinfo.driver_version(), "l2_bytes": device.l2_bytes}
        about |= {"capability": list(device.capability), "multiprocessors": device.multiprocessors}
    return about


def _versions() -> dict[str, str | None]:
    versions = {name: version(name) for name in PACKAGES}
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return versions | {"cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}
