"""Which plans can run here: what of the kernels is built, installed and made for a device."""

from __future__ import annotations

import torch

from . import _extension, _gpu_kernels
from ._capture import constant_in_graphs
from ._tf32 import uses_tf32 as uses_tf32
from .check import PLAN_TRAITS, fits_plan
from .conv_shape import ConvShape


@constant_in_graphs
def missing(plan: str, device: str, index: int = 0) -> str:
    """Why the kernels of a plan cannot serve a device, "" where they can.

    device: its type, "cpu" or "cuda"; index: of the device among its type.
    """
    if plan == "torch":
        return ""
    if PLAN_TRAITS[plan].device == "cpu":
        if device != "cpu":
            return "it is for the CPU"
        error = _extension.extension_error
        return f"the C++ extension is not loaded: {error}" if error is not None else ""
    where = torch.device(device, index)
    ask = _gpu_kernels.triton_error if plan == "triton" else _gpu_kernels.cuda_error
    error = ask(where)
    return error or ""


# Elements that the CUDA C++ kernels can address in a tensor.
_CUDA_ELEMENTS = 2**31


def why_not(plan: str, shape: ConvShape) -> str:
    """Why the kernels of a plan cannot serve a convolution of this size here, "" where they can."""
    reason = missing(plan, shape.device, shape.index)
    if not reason and plan == "cuda" and shape.largest_map() >= _CUDA_ELEMENTS:
        return "a map of 2**31 elements or more is beyond the CUDA C++ kernels"
    return reason


def can_compute(plan: str, shape: ConvShape) -> bool:
    """Whether a plan can compute a convolution on this machine."""
    traits = PLAN_TRAITS[plan]
    if shape.dtype not in traits.dtypes or why_not(plan, shape):
        return False
    if traits.isa and traits.isa != _extension.cpu_isa():
        return False
    return fits_plan(plan, shape.kernel, shape.stride, shape.dilation, shape.groups)
