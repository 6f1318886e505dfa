"""The CUDA kernels compiled for every architecture, beside whatever torch is here: what
check_cuda_sm80.py and check_cuda_sm90.py look at. Compiled once, into build/cuda-check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402

FOLDER = ROOT / "build" / "cuda-check"
_ENVIRON = {
    **os.environ,
    "FORCE_CUDA": "1",
    "FORCE_CPU": "",
    "SANITIZE": "",
    "EMULATE_AVX512": "",
    "DEBUG": "",
    "TORCH_CUDA_ARCH_LIST": build_cuda.ALL_ARCHITECTURES,
}


def plan() -> build_cuda.CudaPlan:
    found = build_cuda.make_plan("", _ENVIRON)
    if not found.build:
        raise SystemExit(found.reason)
    return found


def compiled(kernel: str = "") -> list[build_cuda.Compiled]:
    """The kernels' object files; kernel: "sm80" or "sm90", "" for both."""
    files = build_cuda.compile_kernels(plan(), FOLDER, _ENVIRON)
    return [file for file in files if kernel in ("", file.source.parent.name)]


def machine_code(file: build_cuda.Compiled) -> str:
    """What cuobjdump, which is in Triton's package too, prints; "" where it is not found."""
    tool = shutil.which("cuobjdump")
    spec = find_spec("triton")
    if tool is None and spec is not None and spec.origin is not None:
        packed = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        tool = str(packed) if packed.exists() else None
    if tool is None:
        return ""
    command = [tool, "-sass", str(file.object)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
