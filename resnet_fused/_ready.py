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
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import guard, packing
from ._environment import INTERPRETED
from ._extension import extension_error, release_prepared
from ._streams import Readers

_ops = torch.ops.resnet_fused
_prepare, _run = _ops.prepare.default, _ops.run_prepared.default

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
_is_plain = guard.watch(PLAIN)


def can_be_ready(x: Tensor) -> bool:
    """Whether calls like the present one, with x, can be served by a Ready."""
    able = takes_launches(x) or (x.is_cpu and extension_error is None)
    return _is_plain is not None and able and x.numel() > 0 and _is_plain()


def takes_launches(x: Tensor) -> bool:
    """Whether x is on a GPU, or on the CPU that stands for one in Triton's interpreter."""
    return x.is_cuda or (x.is_cpu and INTERPRETED)


class Ready:
    """Serves inputs of one shape and dtype.

    x: such an input. facts: what must hold. arguments: of the op. watched: tensors on the CPU whose
    address, strides and sampled values must stay what they are.
    """

    __slots__ = ("__weakref__", "_dtype", "_holds", "_prepared", "_watched")

    def __init__(
        self,
        x: Tensor,
        facts: Iterable[guard.Fact],
        arguments: packing.AtOnce,
        watched: list[Tensor],
    ) -> None:
        self._dtype = x.dtype
        self._holds = guard.watch([*PLAIN, *facts])
        self._prepared = _prepare(x, *arguments.tensors, watched, **arguments.keywords)
        self._watched = watched
        # Not at exit: then the whole process ends.
        weakref.finalize(self, release_prepared, self._prepared).atexit = False

    def __call__(self, x: Tensor) -> Tensor | None:
        """The module's output; None if anything is not as it was. x: of the shape prepared."""
        on_cpu = x.is_cpu and self._watched[0].is_cpu  # .to() may have moved the weights
        if not on_cpu or x.dtype is not self._dtype or not self._holds():
            return None
        # Below autograd: nothing needs gradients here, and asking again costs 6 us a call.
        with torch._C._AutoDispatchBelowAutograd():
            return _run(x, self._watched, self._prepared)


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

    def __call__(self, x: Tensor) -> Tensor | None:
        """The module's output; None if anything is not as it was. x: of the shape prepared."""
        if x.device != self._device or x.dtype is not self._dtype or not self._holds():
            return None
        self._readers.add_current()
        with torch._C._AutoDispatchBelowAutograd():
            return self._run(x)
