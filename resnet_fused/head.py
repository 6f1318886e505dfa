"""What follows the last block: the global average pool and the linear layer, for a few images.

On the CPU not fused with anything, only faster (csrc/cpu/head.h); on a GPU one kernel computes both
(csrc/cuda/sm80/head.h). They are no rows of the report.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import guard
from ._links import changed, facts_of, link, run_plainly
from ._ready import PLAIN
from ._wrapper import Wrapper
from .ops import _cuda, extension_error

_ops = torch.ops.resnet_fused
_global_avg_pool, _linear = _ops.global_avg_pool.default, _ops.linear.default
_both = _ops.global_avg_pool_linear_cuda.default

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HeadLayer(Wrapper):
    """In the place of `original`, of whose class it is too; computes the same."""

    def __init__(self, original: nn.Module, name: str) -> None:
        super().__init__(original)
        self.__dict__["link"] = link({name: original}, name, name)
        self.__dict__["_guard"] = None
        self.__dict__["_joined"] = None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if (
            len(args) == 1
            and not kwargs
            and not torch.compiler.is_compiling()
            and type(args[0]) is Tensor
            and self._serves(args[0])
            and self._is_plain()
        ):
            # Below autograd: nothing needs gradients here.
            with torch._C._AutoDispatchBelowAutograd():
                return self._compute(args[0])
        return run_plainly(self, *args, **kwargs)

    def _serves(self, x: Tensor) -> bool:
        """Whether the kernel takes x."""
        raise NotImplementedError

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _is_plain(self) -> bool:
        """Whether nothing but the kernel's result is wanted."""
        holds = self.__dict__["_guard"]
        if holds is None:  # also in a copy
            facts = [*PLAIN, *facts_of(self.link)]
            holds = self.__dict__["_guard"] = guard.watch(facts)
        return holds is not None and holds()


class GlobalAvgPool(HeadLayer, nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d(1)."""

    def _serves(self, x: Tensor) -> bool:
        if x.dim() != 4 or x.numel() == 0 or x.dtype not in _DTYPES or not _is_one(self):
            return False
        if _on_gpu(x):
            return self._joined is not None and self._joined.serves(x)
        return x.is_cpu

    def _compute(self, x: Tensor) -> Tensor:
        return self._joined.mean(x) if _on_gpu(x) else _global_avg_pool(x)


_MOST_IMAGES = 8  # where PyTorch's matrix product gains from its blocks


class Linear(HeadLayer, nn.Linear):
    """nn.Linear."""

    def _serves(self, x: Tensor) -> bool:
        if x.dim() != 2 or x.dtype not in _DTYPES:
            return False
        if _on_gpu(x):
            return self._joined is not None and self._joined.has_products(self, x)
        few = x.is_cpu and 0 < x.shape[0] <= _MOST_IMAGES
        return few and self.operands(x) is not None

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The weight and the bias, if they fit x, whose channels are its second dimension."""
        held = self._parameters  # a parametrization takes what it computes out of here
        weight = held.get("weight")
        if not _fits(weight, x, 2) or x.shape[1] != weight.shape[1] or "bias" not in held:
            return None
        bias = held["bias"]
        fits = bias is None or (_fits(bias, x, 1) and bias.shape[0] == weight.shape[0])
        return (weight, bias) if fits else None

    def _compute(self, x: Tensor) -> Tensor:
        if _on_gpu(x):
            return self._joined.take_products()
        return _linear(x, self._parameters["weight"], self._parameters["bias"])


@dataclass(frozen=True)
class _Products:
    """What the linear layer will give for a mean, and all that it was computed from."""

    mean: Tensor
    y: Tensor
    operands: tuple[Tensor, Tensor | None]
    versions: tuple[int, ...]
    place: tuple[int, bool]


_MOST_UNTAKEN = 8


class Joined:
    """A pool and the linear layer behind it in the same parent: one kernel on a GPU.

    The pool's call launches it and returns the mean. The products wait until the linear layer is
    called with that mean, and are what it returns if nobody has written to the mean or the weights
    since. So nothing is assumed about the parent's forward: whoever calls a layer gets what that
    layer computes. Tensors of torch.inference_mode do not tell who wrote to them; there, PyTorch's
    kernels run.
    """

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        # In succession. Where others are between the layers, or another layer was put in the place
        # of the linear one, the products are for nothing; then they are no longer computed.
        self._untaken = 0
        self._last = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=threading.local())

    def serves(self, x: Tensor) -> bool:
        """Whether the kernel takes x, an image on a GPU, and the linear layer as it is."""
        if self._untaken >= _MOST_UNTAKEN or torch.is_inference_mode_enabled():
            return False
        operands = self._linear.operands(x)
        if operands is None or not self._linear._is_plain():
            return False
        weight, bias = operands
        return (
            x.is_contiguous(memory_format=torch.channels_last)
            and weight.is_contiguous()
            and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
            and not (weight.is_inference() or (bias is not None and bias.is_inference()))
            and _cuda.cuda_error(x.device) is None
            and not _cuda.head_refusal(tuple(x.shape), weight.shape[0], x.element_size())
        )

    def mean(self, x: Tensor) -> Tensor:
        operands = self._linear.operands(x)
        mean, y = _both(x, *operands)
        self._untaken += 1
        self._last.products = _Products(
            mean, y, operands, _versions(mean, *operands), _current_place(x)
        )
        return mean

    def has_products(self, linear: Linear, x: Tensor) -> bool:
        """Whether x is the last mean, flattened, and all is as it was. linear: who asks."""
        last = getattr(self._last, "products", None)
        if last is None or x._base is not last.mean or torch.is_inference_mode_enabled():
            return False
        operands = linear.operands(x)
        return (
            operands is not None
            and all(map(operator.is_, operands, last.operands))
            and x.shape == last.mean.shape[:2]
            and x.is_contiguous()
            and _versions(last.mean, *operands) == last.versions
            and _current_place(x) == last.place
        )

    def take_products(self) -> Tensor:
        y = self._last.products.y
        self._last.products = None  # the next caller's are its own
        self._untaken = 0
        return y


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors if tensor is not None)


def _current_place(x: Tensor) -> tuple[int, bool]:
    """The stream, and whether a graph is captured: elsewhere kernels may run in another order."""
    stream = torch._C._cuda_getCurrentRawStream(x.get_device())
    return stream, torch.cuda.is_current_stream_capturing()


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _fits(tensor: Any, x: Tensor, dims: int) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
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
    last: GlobalAvgPool | None = None  # without a linear layer yet
    for name, child in list(parent._modules.items()):
        kind = type(child)
        if kind is nn.AdaptiveAvgPool2d and _is_one(child):
            pooled, last = True, None
        elif not (kind is nn.Linear and pooled):
            continue
        if changed(link({name: child}, name, name)) is not None:
            continue
        if kind is nn.Linear:
            layer = Linear(child, name)
            if last is not None:
                last.__dict__["_joined"] = layer.__dict__["_joined"] = Joined(layer)
            last = None
        else:
            layer = last = GlobalAvgPool(child, name)
        yield name, layer
