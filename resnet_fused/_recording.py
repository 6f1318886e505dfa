"""One CUDA graph of a model: recorded once, replayed on other values of the same inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ._streams import Readers

_T = TypeVar("_T")
_WARMUP = 3  # calls before a recording: they pack weights, compile kernels and let cuDNN choose


def capture(call: Callable[[], _T], times: int = 1) -> tuple[torch.cuda.CUDAGraph, _T]:
    """`times` calls as one CUDA graph of the current device, and what the last of them returned.

    Raises what `call` raises, and RuntimeError where something in it cannot be recorded, a
    synchronisation for instance.
    """
    # One stream for warm-up and recording, since workspaces belong to one; and of this device:
    # torch.cuda.graph's own is of the device on which this process recorded first.
    side, before = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(before)
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            call()
    before.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads go on with their work, which may allocate memory.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            for _ in range(times):
                result = call()
    finally:
        torch.cuda.set_stream(before)  # where a recording fails, torch leaves its stream current
    return graph, result


class Recording:
    """run(*inputs) as a CUDA graph.

    run: tensors to tensors, all on one GPU. inputs: examples; their values are free, their shapes,
    dtypes and strides are not. Raises what `run` raises, and RuntimeError where something in it
    cannot be recorded, a synchronisation for instance.
    """

    def __init__(
        self, run: Callable[[Sequence[Tensor]], Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> None:
        device = inputs[0].device
        self._lock = threading.Lock()
        self._inputs = [x.detach().clone() for x in inputs]
        self._readers = Readers(self._inputs)
        self._done = torch.cuda.Event()
        with torch.cuda.device(device):
            self._graph, outputs = capture(lambda: run(self._inputs))
            self._outputs = list(outputs)
            self._done.record()

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, in memory of their own, on the current stream.

        The graph has one set of buffers: replays of several threads or streams wait for each other.
        """
        with self._lock, torch.cuda.device(self._inputs[0].device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            self._readers.add_current()
            for ours, given in zip(self._inputs, inputs, strict=True):
                ours.copy_(given, non_blocking=True)
            self._graph.replay()
            outputs = [y.clone() for y in self._outputs]
            self._done.record(stream)
        return outputs
