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


def warm_up(call: Callable[[], object]) -> torch.cuda.Stream:
    """Some calls on a new stream of the current device, which is returned, to be recorded on.

    On one stream, since workspaces belong to one.
    """
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            call()
    current.wait_stream(side)
    return side


def record(
    call: Callable[[], _T], stream: torch.cuda.Stream, times: int = 1
) -> tuple[torch.cuda.CUDAGraph, _T]:
    """`times` calls as one CUDA graph, and what the last of them returned.

    stream: of the device that is current; torch.cuda.graph's own is of the one on which the process
    recorded first. Raises what `call` raises, and RuntimeError where something in it cannot be
    recorded, a synchronisation for instance.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # Other threads go on with their work, which may allocate memory.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
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
            stream = warm_up(lambda: run(self._inputs))
            self._graph, outputs = record(lambda: run(self._inputs), stream)
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
