"""Builds and loads the host side of the CUDA C++ kernels beside a GPU that computes nothing: CPU
tensors go from ops to launches, which are kept (csrc/cuda/emulate/null_device.cpp)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from emulated_sm90 import CSRC, ROOT, alone, cuda_headers

SOURCES = sorted(
    [*CSRC.glob("cuda/*.cpp"), *CSRC.glob("cuda/sm80/*.cpp"), *CSRC.glob("cuda/sm90/*.cpp")]
)
NULL_DEVICE = CSRC / "cuda" / "emulate" / "null_device.cpp"
BUILT = ROOT / "build" / "emulated"


def why_not() -> str | None:
    """Why it cannot be built here, or None."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "there is no g++"
    if torch.version.cuda is not None:
        return "this torch has CUDA, whose symbols the null device would meet"
    return None if cuda_headers() else "there are no CUDA headers (CUDA_HOME or nvcc)"


def build(folder: Path = BUILT) -> Path:
    """Compiles it into `folder`, unless it is there."""
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-attributes", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}", f"-isystem{include}"]
    flags += [f"-isystem{include}/torch/csrc/api/include", f"-isystem{cuda_headers()}"]
    # Its own symbols before torch's.
    link = ["-shared", "-Wl,-Bsymbolic", f"-L{include.parent}/lib", "-ltorch_cpu", "-lc10", "-ldl"]
    digest = hashlib.sha256(repr((flags, link, torch.__version__)).encode())
    for file in sorted(f for f in CSRC.rglob("*") if f.suffix in (".h", ".cuh", ".cpp")):
        digest.update(file.read_bytes())
    library = folder / f"null_device-{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library

    def compiled(source: Path) -> str:
        made = folder / f"null-{'-'.join(source.relative_to(CSRC).parts)}.o"
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    with alone(folder, "null"), ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*SOURCES, NULL_DEVICE]))
        subprocess.run(["g++", *objects, *link, "-o", str(library)], check=True)
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Loads it into this process, for good: conv_bn_act_cuda and its kin then take CPU tensors."""
    library = build()
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.null_device_launches.restype = ctypes.c_char_p
    return loaded
