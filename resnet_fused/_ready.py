"""What serves a fused module's next call when nothing has changed since the last.

The first call with an input of some shape checks everything in Python, chooses, packs and prepares;
`Ready` keeps the facts that it found, as a guard, and the prepared op. As long as the facts hold,
calls with such inputs take a few microseconds beside the kernels; else `FusedModule` starts again
from the beginning. Measured within ResNet-18, whose weights push Python's own objects out of the
caches: a block's checks and op took 130 us, and batch 1 fell from 9.8 to 8.8 ms. Warm, a whole call
on a 4 x 4 map takes 15 us.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import guard, packing
from ._environment import INTERPRETED
from ._extension import extension_error, release_prepared
from ._streams import Readers

_ops = torch.ops.resnet_fused
_prepare, _run = _ops.prepare.default, _ops.run_prepared.default
_prepare_chain = _ops.prepare_chain.default

# Plain, untraced computation without gradients is going on.
PLAIN = (
    guard.returns(torch.is_grad_enabled, False),
    guard.returns(torch._C._is_any_autocast_enabled, False),
    guard.returns(torch._C._functorch.peek_interpreter_stack, None),
    guard.item_equals(vars(forward_ad), "_current_level", -1),  # the last two: ops/_transforms.py
    guard.returns(torch._C._len_torch_function_stack, 0),
    guard.returns(torch._C._len_torch_dispatch_stack, 0),
    guard.returns(torch._C._get_tracing_state, None),
)
_holds_now = guard.watch(PLAIN)


def is_plain() -> bool:
    """Whether PLAIN holds, and facts can be watched at all."""
    return _holds_now is not None and _holds_now()


def can_be_ready(x: Tensor) -> bool:
    """Whether calls like the present one, with x, can be served by a Ready."""
    able = takes_launches(x) or (x.is_cpu and extension_error is None)
    return able and x.numel() > 0 and is_plain()


def takes_launches(x: Tensor) -> bool:
    """Whether x is on a GPU, or on the CPU that stands for one in Triton's interpreter."""
    return x.is_cuda or (x.is_cpu and INTERPRETED)


@dataclass(frozen=True, eq=False)
class Head:
    """What follows the last block of a chain: average pool, linear layer behind it."""

    pools: bool = False
    weight: Tensor | None = None  # of the linear layer; None: without
    bias: Tensor | None = None

    @property
    def linear(self) -> bool:
        return self.weight is not None

    @property
    def operands(self) -> list[Tensor]:
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None]

    def runs(self) -> list[Callable[[Tensor], Tensor]]:
        """Its layers one by one, without their checks."""
        pool = [_ops.global_avg_pool.default] if self.pools else []
        return [*pool, self._run_linear] if self.linear else pool

    def _run_linear(self, x: Tensor) -> Tensor:
        return _ops.linear.default(x.flatten(1), self.weight, self.bias)


class Ready:
    """Serves inputs of one shape and dtype.

    x: such an input. facts: what must hold. prepared: what an op has prepared, to be released with
    this. linear: operands of a linear layer that it ends with.
    """

    __slots__ = ("__weakref__", "_dtype", "_holds", "_linear", "_prepared")

    def __init__(
        self, x: Tensor, facts: Iterable[guard.Fact], prepared: int, linear: Sequence[Tensor] = ()
    ) -> None:
        self._dtype = x.dtype
        self._holds = guard.watch([*PLAIN, *facts])
        self._prepared = prepared
        self._linear = list(linear)
        # Not at exit: then the whole process ends.
        weakref.finalize(self, release_prepared, prepared).atexit = False

    @classmethod
    def of(cls, x: Tensor, facts: Iterable[guard.Fact], arguments: packing.AtOnce) -> Ready:
        """For one module; arguments: of the op."""
        return cls(x, facts, _prepare(x, *arguments.tensors, **arguments.keywords))

    @classmethod
    def chain(
        cls, x: Tensor, facts: Iterable[guard.Fact], parts: Sequence[Ready], head: Head
    ) -> Ready | None:
        """For modules that hand their outputs on to each other; x: an input of the first. None
        where a part does not take what the one before it returns."""
        ids = [part._prepared for part in parts]
        prepared = _prepare_chain(x, ids, pools=head.pools, linear=head.operands)
        return None if prepared is None else cls(x, facts, prepared, head.operands)

    def takes(self, x: Tensor) -> bool:
        """Whether x may be its input, but for the shape."""
        return x.is_cpu and x.dtype is self._dtype

    def fits(self, x: Tensor) -> bool:
        """Whether x may be its input, but for the shape, and the facts hold."""
        return self.takes(x) and self._holds()

    def __call__(self, x: Tensor) -> Tensor | None:
        """The module's output; None if anything is not as it was. x: of the shape prepared."""
        if not self.fits(x):
            return None
        # Below autograd: nothing needs gradients here, and asking again costs 6 us a call.
        with torch._C._AutoDispatchBelowAutograd():
            return _run(x, self._prepared, self._linear)


class ReadyOnGpu:
    """Serves inputs of one shape, dtype and device.

    run: launches what computes the output. readers: of the packed weights.
    """

    __slots__ = ("_device", "_dtype", "_holds", "_readers", "_run")

    def __init__(
        self,
        x: Tensor,
        facts: Iterable[guard.Fact],
        run: Callable[[Tensor], Tensor],
        readers: Readers,
    ) -> None:
        self._dtype, self._device = x.dtype, x.device
        self._holds = guard.watch([*PLAIN, *facts])
        self._run = run
        self._readers = readers

    @classmethod
    def chain(
        cls, x: Tensor, facts: Iterable[guard.Fact], parts: Sequence[ReadyOnGpu], head: Head
    ) -> ReadyOnGpu:
        """As Ready.chain."""
        runs = [part._run for part in parts] + head.runs()
        readers = Readers(tensor for part in parts for tensor in part._readers.tensors)

        def run(x: Tensor) -> Tensor:
            for one in runs:
                x = one(x)
            return x

        return cls(x, facts, run, readers)

    def takes(self, x: Tensor) -> bool:
        """As Ready.takes."""
        return x.device == self._device and x.dtype is self._dtype

    def fits(self, x: Tensor) -> bool:
        """As Ready.fits."""
        return self.takes(x) and self._holds()

    def __call__(self, x: Tensor) -> Tensor | None:
        """The module's output; None if anything is not as it was. x: of the shape prepared."""
        if not self.fits(x):
            return None
        self._readers.add_current()
        with torch._C._AutoDispatchBelowAutograd():
            return self._run(x)
