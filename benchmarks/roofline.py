"""What a GPU's matrix units and memory allow a net at best, from the shapes of its layers.

The floor of a step is the longer of two times: its multiply-adds at the speed of a large matrix
product, its tensors read or written once at the speed of a large copy. A net's floor is the sum
over its steps: each convolution with everything behind it (batch norm, addition, ReLU) is one, a
shortcut's convolution belongs to the block's last one, and so pooling and the linear layer are
steps of their own. Kernels that do more at once, and caches that hold a whole small batch, can beat
the second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from resnet_fused._survey import join, survey

from .accounting import direct_multiplications
from .common import Timed
from .layers import Layer, all_layers

MATRIX = 8192  # rows and columns of the product: 1.1e12 operations
COPY_BYTES = 1 << 30  # beyond every cache
SAMPLES = 9


@dataclass(frozen=True)
class Ceilings:
    """multiply_adds: a second, in one dtype. copy_bytes: a second, read and written ones."""

    multiply_adds: float
    copy_bytes: float

    @property
    def tflops(self) -> float:
        return 2e-12 * self.multiply_adds

    def record(self) -> dict[str, float]:
        """For JSON."""
        return {"matmul_tflops": self.tflops, "copy_gbytes_per_s": 1e-9 * self.copy_bytes}


@dataclass(frozen=True)
class Work:
    """One step: multiply-adds of its direct convolutions, elements it reads and writes."""

    multiplications: int
    elements: int

    def __add__(self, other: Work) -> Work:
        return Work(self.multiplications + other.multiplications, self.elements + other.elements)

    def floor(self, itemsize: int, ceilings: Ceilings) -> float:
        """Seconds."""
        multiplying = self.multiplications / ceilings.multiply_adds
        return max(multiplying, self.elements * itemsize / ceilings.copy_bytes)


def ceilings(
    dtype: torch.dtype,
    device: torch.device,
    timed: Callable[[Callable[[], object]], Timed],
    *,
    matrix: int = MATRIX,
    copy_bytes: int = COPY_BYTES,
) -> Ceilings:
    """Measures both: medians of a few samples of calls made `timed`."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:  # on zeros a GPU draws less power and runs faster
        return torch.randn(*size, generator=generator, device=device)

    a, b = normal(matrix, matrix).to(dtype), normal(matrix, matrix).to(dtype)
    product = torch.empty_like(a)
    seconds = _median(timed(lambda: torch.mm(a, b, out=product)))
    source = normal(copy_bytes // 4)
    target = torch.empty_like(source)
    copying = _median(timed(lambda: target.copy_(source)))
    return Ceilings(matrix**3 / seconds, 2 * copy_bytes / copying)


def _median(runner: Timed) -> float:
    runner.time(2)
    return median(runner.time(5) for _ in range(SAMPLES))


def net_floor(steps: list[Work], itemsize: int, ceilings: Ceilings) -> float:
    """Seconds."""
    return sum(step.floor(itemsize, ceilings) for step in steps)


def layer_work(layer: Layer, batch: int, *, joined: bool = False) -> Work:
    """A convolution with its epilogue. joined: a shortcut's, whose output is never stored."""
    outputs = 0 if joined else batch * layer.out_channels * _area(layer.out_size)
    # A strided 1x1 convolution needs only the pixels that it looks at.
    area = _area(layer.out_size if layer.kernel == (1, 1) else layer.in_size)
    inputs = batch * layer.in_channels * area
    taps = layer.kernel[0] * layer.kernel[1]
    weights = layer.out_channels * layer.in_channels // layer.groups * taps
    residual = outputs if layer.residual else 0
    return Work(direct_multiplications(layer, batch), inputs + weights + outputs + residual)


def net_work(model: nn.Module, size: int, batch: int) -> list[Work]:
    """The steps of a net of resnet_fused.models for `batch` images of `size` rows and columns."""
    layers = {layer.name: layer for layer in all_layers(model, size)}
    found = survey(model)
    steps = []
    for parent, site in found.sites:
        stem = layers[join(parent, site.unit.conv_name)]
        steps.append(layer_work(stem, batch))
        if site.max_pool is not None:
            steps.append(_pool_work(stem, batch))
    for block, recipe in found.blocks:
        own = [layers[join(block, unit.conv_name)] for unit in recipe.main]
        steps += [layer_work(layer, batch) for layer in own[:-1]]
        last = layer_work(own[-1], batch)
        if recipe.shortcut is not None:
            shortcut = layers[join(block, recipe.shortcut.conv_name)]
            read = batch * own[-1].out_channels * _area(own[-1].out_size)  # no residual is
            last += layer_work(shortcut, batch, joined=True) + Work(0, -read)
        steps.append(last)
    return steps + _head_work(model, own[-1], batch)


def _pool_work(stem: Layer, batch: int) -> Work:
    """3x3, stride 2: reads the stem's output, writes a quarter of it."""
    rows, cols = stem.out_size
    pooled = ((rows + 1) // 2) * ((cols + 1) // 2)
    return Work(0, batch * stem.out_channels * (rows * cols + pooled))


def _head_work(model: nn.Module, last: Layer, batch: int) -> list[Work]:
    """Average pool and linear layer, one step each."""
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    features, classes = linear.in_features, linear.out_features
    pool = Work(0, batch * features * (_area(last.out_size) + 1))
    product = batch * features * classes
    return [pool, Work(product, batch * (features + classes) + features * classes)]


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
