"""One CUDA graph of a model: recorded once, replayed on other values of the same inputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WARMUP = 3  # calls before a recording: they pack weights, compile kernels and let cuDNN choose


def warm_up(call: Callable[[], object]) -> torch.cuda.Stream:
    """Calls it some times, as a recording needs it, on a stream beside the current one: that one.

    Not on the default stream, on which nothing can be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    return side


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
        self._done = torch.cuda.Event()
        with torch.cuda.device(device):
            warm_up(lambda: run(self._inputs))
            self._graph = torch.cuda.CUDAGraph()
            # Other threads go on with their work, which may allocate memory.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = list(run(self._inputs))
            self._done.record()

    def replay(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for these inputs, in memory of their own, on the current stream.

        The graph has one set of buffers: replays of several threads or streams wait for each other.
        """
        with self._lock, torch.cuda.device(self._inputs[0].device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            for ours, given in zip(self._inputs, inputs, strict=True):
                ours.copy_(given, non_blocking=True)
            self._graph.replay()
            outputs = [y.clone() for y in self._outputs]
            self._done.record(stream)
        return outputs
