"""What measured answers on a GPU depend on: its name, the driver, and who generates the code."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import zlib
from pathlib import Path

import torch

ROOT = Path("/")


@functools.cache
def processor(index: int) -> str:
    """One GPU of this process as a line, "NVIDIA H200, driver 580.95.05, triton 3.6.0"."""
    name = torch.cuda.get_device_name(index)
    return f"{name}, driver {driver_version()}, triton {triton_version()}"


def driver_version(root: Path = ROOT) -> str:
    """NVIDIA's kernel driver as Linux tells, else the CUDA version that it serves."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)*)\s", text)
    if found:
        return found.group(1)
    try:
        version = torch._C._cuda_getDriverVersion()
    except AttributeError:  # a torch without CUDA
        return "unknown"
    return f"for CUDA {version // 1000}.{version % 1000 // 10}"


def triton_version() -> str:
    """The version that is installed, "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def cuda_kernels_id() -> str:
    """Eight digits that change with the compiled CUDA C++ kernels, "none" without them."""
    found = importlib.util.find_spec("resnet_fused._C_cuda")
    if found is None or found.origin is None:
        return "none"
    return f"{zlib.crc32(Path(found.origin).read_bytes()):08x}"


@functools.cache
def triton_kernels_id() -> str:
    """Eight digits that change with the sources of the Triton kernels."""
    folder, total = Path(__file__).with_name("triton_kernels"), 0
    for path in sorted(folder.glob("*.py")):
        total = zlib.crc32(path.read_bytes(), total)
    return f"{total:08x}"
