"""The same net compiled by XLA through JAX, batch norms folded, where JAX with a GPU is installed.

JAX shares the process, and its arrays are its own; so the host's clock times a row of calls up to
the last one's result. Its launches hide behind its kernels where these are longer.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .common import Unavailable
from .folded_net import Conv, Net, folded_net


def engine(clock: Any, model: nn.Module, x: Tensor) -> JaxRunner:
    """model: a net of resnet_fused.models; x (N, C, H, W). Raises Unavailable."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes 3/4 of a GPU
    try:
        import jax
    except ImportError as error:
        raise Unavailable("jax is not installed") from error
    if clock.is_gpu and jax.default_backend() != "gpu":
        raise Unavailable("jax is installed without its GPU plugin")
    net = folded_net(model)
    images = _array(x.permute(0, 2, 3, 1))
    return JaxRunner(jax.jit(functools.partial(_forward, net)), _arrays(net), images, x.device)


@dataclass(frozen=True, eq=False)
class JaxRunner:
    """function(arrays, images), compiled at its first call."""

    function: Callable[[Any, Any], Any]
    arrays: Any
    images: Any
    device: torch.device

    def run(self) -> Tensor:
        """Logits (N, classes) in float32, on `device`."""
        import jax.numpy as jnp
        import numpy

        y = self.function(self.arrays, self.images)
        return torch.from_numpy(numpy.array(y.astype(jnp.float32))).to(self.device)

    def time(self, calls: int) -> float:
        self.function(self.arrays, self.images).block_until_ready()
        start = time.perf_counter()
        for _ in range(calls):
            y = self.function(self.arrays, self.images)
        y.block_until_ready()
        return (time.perf_counter() - start) / calls


def _arrays(net: Net) -> dict[str, Any]:
    """The net's weights, nested: arguments of the compiled function."""
    return {
        "stem": _conv_arrays(net.stem),
        "main": [[_conv_arrays(conv) for conv in block.main] for block in net.blocks],
        "shortcut": [
            None if block.shortcut is None else _conv_arrays(block.shortcut) for block in net.blocks
        ],
        "linear": (_array(net.weight), _array(net.bias)),
    }


def _conv_arrays(conv: Conv) -> tuple[Any, Any]:
    return _array(conv.weight.permute(2, 3, 1, 0)), _array(conv.bias)  # RSCK


def _array(t: Tensor) -> Any:
    """A JAX array of the same dtype, over float32, which holds all 16-bit numbers."""
    import jax.numpy as jnp

    return jnp.asarray(t.float().contiguous().cpu().numpy(), getattr(jnp, str(t.dtype)[6:]))


def _forward(net: Net, arrays: dict[str, Any], images: Any) -> Any:
    """Logits of images (N, H, W, C); of `net` only what is fixed at compilation is used."""
    import jax.numpy as jnp
    from jax import lax

    y = _conv(images, arrays["stem"], net.stem)
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    low = jnp.array(-jnp.inf, y.dtype)
    y = lax.reduce_window(y, low, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)
    for block, main, other in zip(net.blocks, arrays["main"], arrays["shortcut"], strict=True):
        shortcut = y if block.shortcut is None else _conv(y, other, block.shortcut)
        for conv, own in zip(block.main[:-1], main[:-1], strict=True):
            y = _conv(y, own, conv)
        y = _conv(y, main[-1], block.main[-1], shortcut)
    weight, bias = arrays["linear"]
    return jnp.mean(y, (1, 2)) @ weight.T + bias


def _conv(x: Any, arrays: tuple[Any, Any], conv: Conv, added: Any = None) -> Any:
    import jax.numpy as jnp
    from jax import lax

    weight, bias = arrays
    y = lax.conv_general_dilated(
        x,
        weight,
        window_strides=conv.stride,
        padding=[(pad, pad) for pad in conv.padding],
        rhs_dilation=conv.dilation,
        feature_group_count=conv.groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y + bias if added is None else y + bias + added
    return jnp.maximum(y, 0) if conv.relu else y
