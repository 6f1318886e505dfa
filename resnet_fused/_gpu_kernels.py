"""Whether kernels of ours can serve a GPU: CUDA C++, an extension of its own, and Triton."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

from ._capture import constant_in_graphs
from ._environment import INTERPRETED
from ._extension import Loaded, load

OLDEST_CAPABILITY = (8, 0)
RELEASE = "resnet_fused_release_prepared_cuda"


def _load() -> Loaded:
    """Only a torch with CUDA can load it."""
    without_cuda = torch.version.cuda is None
    return load(
        "_C_cuda",
        "the CUDA C++ kernels",
        RELEASE,
        absent="the CUDA C++ kernels are not built",
        refusal="torch was built without CUDA" if without_cuda else "",
    )


_loaded = _load()

extension_error: str | None = _loaded.error
"""None where the CUDA C++ kernels are loaded, else why they are not."""

release_prepared: Callable[[int], None] = _loaded.release
"""Frees what the op `prepare_cuda` returned."""


def cuda_error(device: torch.device) -> str | None:
    """Why the CUDA C++ kernels cannot serve a device; None where they can."""
    if extension_error is not None:
        return extension_error
    if device.type != "cuda" or (device.index is None and not torch.cuda.is_available()):
        return "there is no GPU"
    return _error_on(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache  # asking whether there is a GPU takes microseconds, too
def _error_on(index: int) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is not None:
        return "the CUDA C++ kernels are for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return _too_old(capability)
    words = _image_error(index)
    if "no kernel image" not in words and "PTX" not in words:
        return words or None
    major, minor = capability
    return (
        f"the CUDA C++ kernels were compiled for other GPUs than sm_{major}{minor} ({words}): "
        f"build them with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


@constant_in_graphs
def _image_error(index: int) -> str:
    """The CUDA runtime's words where it cannot load the kernels on a GPU, "" where it can."""
    return torch.ops.resnet_fused.cuda_image_error(index)


@functools.cache
def triton_error(device: torch.device) -> str | None:
    """Why the Triton kernels cannot serve a device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if INTERPRETED:
        return None if device.type == "cpu" else "Triton's interpreter is on, for the CPU"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is not None:
        return "the Triton kernels were not tried on AMD's GPUs"
    capability = torch.cuda.get_device_capability(device)
    return _too_old(capability) if capability < OLDEST_CAPABILITY else None


def _too_old(capability: tuple[int, int]) -> str:
    oldest = "".join(map(str, OLDEST_CAPABILITY))
    return f"sm_{capability[0]}{capability[1]} is older than sm_{oldest}"
