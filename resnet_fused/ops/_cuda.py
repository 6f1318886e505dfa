"""conv_bn_act_cuda and add_relu_cuda: the CUDA C++ kernels as ops."""

from __future__ import annotations

import torch


def cuda_error(device: torch.device) -> str | None:
    """Why the CUDA C++ kernels cannot serve a device; None where they can."""
    return "the CUDA C++ kernels are not built"
