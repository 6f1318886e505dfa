"""Whether float32 may be multiplied as TF32, with 11 bits, in convolutions on a GPU."""

from __future__ import annotations

import torch


def uses_tf32() -> bool:
    """torch's own flag for that: torch.backends.cudnn.conv.fp32_precision or allow_tf32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"
