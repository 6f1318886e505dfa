"""What follows the last block: the global average pool and the linear layer (csrc/cpu/head.h, for
GPUs csrc/cuda/sm80/head.h).

Not fused with anything, only faster for a few images; so they are no rows of the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import _gpu_kernels, guard
from ._chain import passes_on
from ._extension import extension_error
from ._links import changed, facts_of, link
from ._ready import PLAIN
from ._wrapper import Wrapper, run_plainly

_ops = torch.ops.resnet_fused
_global_avg_pool, _linear = _ops.global_avg_pool.default, _ops.linear.default

_CHANNELS_LAST = torch.channels_last
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HeadLayer(Wrapper):
    """In the place of `original`, of whose class it is too; computes the same."""

    def __init__(self, original: nn.Module, name: str) -> None:
        super().__init__(original)
        self.__dict__["link"] = link({name: original}, name, name)
        self.__dict__["_guard"] = None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if (
            len(args) == 1
            and not kwargs
            and not torch.compiler.is_compiling()
            and type(args[0]) is Tensor
        ):
            if passes_on(self, args[0]):
                return args[0]
            if self._is_plain() and self.serves(args[0]):
                # Below autograd: nothing needs gradients here.
                with torch._C._AutoDispatchBelowAutograd():
                    return self._compute(args[0])
        return run_plainly(self, *args, **kwargs)

    def serves(self, x: Tensor) -> bool:
        """Whether the kernel takes x."""
        raise NotImplementedError

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def chain_facts(self) -> list[guard.Fact]:
        """What must hold for the kernel to serve as a part of a chain's, for inputs like those that
        it serves now."""
        return facts_of(self.link)

    def _is_plain(self) -> bool:
        """Whether nothing but the kernel's result is wanted."""
        holds = self.__dict__["_guard"]
        if holds is None:  # also in a copy
            holds = self.__dict__["_guard"] = guard.watch([*PLAIN, *facts_of(self.link)])
        return holds is not None and holds()


class GlobalAvgPool(HeadLayer, nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d(1)."""

    def serves(self, x: Tensor) -> bool:
        return (
            x.dim() == 4
            and x.numel() > 0
            and _has_kernels(x)
            and _is_one(self)
            and (x.is_cpu or (_in_vectors(x) and x.is_contiguous(memory_format=_CHANNELS_LAST)))
        )

    def _compute(self, x: Tensor) -> Tensor:
        return _global_avg_pool(x)

    def chain_facts(self) -> list[guard.Fact]:
        return [*super().chain_facts(), guard.attribute(self.original(), "output_size")]


_MOST_IMAGES = 8  # where PyTorch's matrix product gains from its blocks


class Linear(HeadLayer, nn.Linear):
    """nn.Linear."""

    def serves(self, x: Tensor) -> bool:
        held = self._parameters  # a parametrization takes what it computes out of here
        weight = held.get("weight")
        if x.dim() != 2 or not 0 < x.shape[0] <= _MOST_IMAGES or not _has_kernels(x):
            return False
        if not _fits(weight, x, 2) or x.shape[1] != weight.shape[1] or "bias" not in held:
            return False
        if not (x.is_cpu or (_in_vectors(x) and x.is_contiguous() and weight.is_contiguous())):
            return False
        bias = held["bias"]
        return bias is None or (_fits(bias, x, 1) and bias.shape[0] == weight.shape[0])

    def _compute(self, x: Tensor) -> Tensor:
        return _linear(x, self._parameters["weight"], self._parameters["bias"])

    def chain_facts(self) -> list[guard.Fact]:
        held = self._parameters
        facts = [guard.item_is(held, key, value) for key, value in held.items()]
        taken = guard.snapshot([tensor for tensor in held.values() if tensor is not None])
        if taken is not None:  # on the CPU
            facts.append(guard.lies(taken))
        return [*super().chain_facts(), *facts]


def _has_kernels(x: Tensor) -> bool:
    return (
        x.dtype in _DTYPES
        and x.layout is torch.strided
        and (x.is_cpu or (x.is_cuda and _gpu_kernels.cuda_error(x.device) is None))
    )


def _in_vectors(x: Tensor) -> bool:
    """Whether a GPU's 16-byte loads take the channels, or inputs, whole."""
    return x.shape[1] * x.element_size() % 16 == 0


def _fits(tensor: Any, x: Tensor, dims: int) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.dtype is x.dtype
        and tensor.dim() == dims
        and tensor.device == x.device
    )


def _is_one(pool: nn.AdaptiveAvgPool2d) -> bool:
    return pool.output_size in (1, (1, 1))


def heads(parent: nn.Module) -> Iterator[tuple[str, HeadLayer]]:
    """What can take the places of a parent's children: a global average pool, linear layers behind.

    Only layers that are nothing but what their class says.
    """
    if extension_error is not None:
        return
    pooled = False
    for name, child in list(parent._modules.items()):
        kind = type(child)
        if kind is nn.AdaptiveAvgPool2d and _is_one(child):
            pooled = True
        elif not (kind is nn.Linear and pooled):
            continue
        if changed(link({name: child}, name, name)) is None:
            yield name, (Linear if kind is nn.Linear else GlobalAvgPool)(child, name)
