"""Timing on a GPU: by events around replays of a CUDA graph, or around calls where none can be.

The host's clock would count launches, which take a few microseconds each and hide behind kernels
only if these are longer. A graph of several calls leaves the kernels and the gaps between them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from .._errors import one_line
from .._recording import record, warm_up

GRAPH_CALLS = 10  # in one graph: its own launch, about 10 us, is spread over so many


class NotCapturable(RuntimeError):
    """Why calls cannot be recorded as a CUDA graph, in one line."""


class EventRunner:
    """Timed by two events around calls that are launched one by one: fulfils `Timed`.

    call() launches work on the current stream of `device`; context() is entered around it, off the
    clock. Where kernels are shorter than their launches this is the time of the launches.
    """

    def __init__(
        self,
        call: Callable[[], object],
        device: torch.device,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.call, self.device, self.context = call, torch.device(device), context

    def run(self) -> object:
        """One run in its context."""
        with torch.cuda.device(self.device), self.context():
            return self.call()

    def time(self, calls: int) -> float:
        """Seconds per call of that many in a row."""
        with torch.cuda.device(self.device), self.context():
            return seconds_between_events(self.call, calls) / calls


class GraphRunner:
    """Timed by two events around replays of one CUDA graph of `calls` calls: fulfils `Timed`.

    call() is recorded `calls` times in a row, after some runs on a side stream; it may take another
    input each time (and so keep them out of the cache). context() is entered around recording.
    `output` is what the last of them returned, in memory that every replay overwrites; tensors that
    call() read must be kept by the caller.

    Raises NotCapturable where call() does what a recording forbids, like waiting for the GPU.
    """

    def __init__(
        self,
        call: Callable[[], object],
        device: torch.device,
        calls: int = GRAPH_CALLS,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        if calls < 1:
            raise ValueError(f"calls must be at least 1, got {calls}")
        self.call, self.device, self.context = call, torch.device(device), context
        self.calls = calls
        self.output: object = None
        self._graph = self._record()

    def run(self) -> object:
        """One replay, and `output` after it."""
        with torch.cuda.device(self.device):
            self._graph.replay()
            torch.cuda.synchronize()
        return self.output

    def time(self, calls: int) -> float:
        """Seconds per call of about that many: of as many replays as come nearest, at least one."""
        replays = max(1, round(calls / self.calls))
        with torch.cuda.device(self.device):
            return seconds_between_events(self._graph.replay, replays) / (replays * self.calls)

    def _record(self) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self.device), self.context():
            stream = warm_up(self.call)
            try:
                graph, self.output = record(self.call, stream, self.calls)
            except RuntimeError as error:
                raise NotCapturable(f"no CUDA graph: {one_line(error, None)}") from error
            graph.replay()
            torch.cuda.synchronize()
        return graph


def seconds_between_events(launch: Callable[[], object], times: int) -> float:
    """Seconds on the GPU from before the first to behind the last of `times` launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()  # others' work is not counted
    start.record()
    for _ in range(times):
        launch()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)
