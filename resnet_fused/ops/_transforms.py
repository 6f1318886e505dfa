"""What only PyTorch's own operations can do: function transforms, forward-mode gradients."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether torch.func (grad, jvp, vmap ...) or a forward_ad.dual_level is at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None or is_dual()


def is_dual() -> bool:
    return forward_ad._current_level >= 0
