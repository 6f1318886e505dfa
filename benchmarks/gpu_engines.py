"""The ways to run a net that bench_gpu compares, and how each is timed.

Weights and images are in channels_last, everything runs under inference mode. Engines whose title
says "CUDA graph", the compiled ones and cuDNN's fused ops are timed as replays of a graph of
several calls, ours likewise beside them; "eager channels_last", "fused" and "fused + rf.graph" are
timed call by call, as a program makes them, with events. The calls take equal images from different
addresses in turn.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused.measure.engines import GRAPHED, RECORDED, Engine, Prepared
from resnet_fused.measure.gpu_timing import GRAPH_CALLS, EventRunner, GraphRunner, NotCapturable

from . import folded_net, gpu_jax
from .common import CHANNELS_LAST, FUSED, Runner, Unavailable

INPUTS = 4  # images at so many addresses
RECOMPILES = 64  # nets that share a forward's code; torch.compile gives up after 8

Call = Callable[[], Any]


@dataclass(frozen=True)
class Clock:
    """How calls are timed on a device. On the CPU, for a dry run, by the host's clock."""

    device: torch.device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def launched(self, call: Call) -> Prepared:
        """Call by call."""
        if self.is_gpu:
            return EventRunner(call, self.device, torch.inference_mode)
        return Runner(call, torch.inference_mode)

    def recorded(self, call: Call, calls: int = GRAPH_CALLS) -> Prepared:
        """As a CUDA graph of `calls` calls."""
        if self.is_gpu:
            return GraphRunner(call, self.device, calls, torch.inference_mode)
        return Runner(call, torch.inference_mode)


def engines(clock: Clock) -> dict[str, tuple[str, Engine]]:
    """Word for --only -> (title, engine), in the order of the tables."""
    return {
        word: (TITLES[word], functools.partial(engine, clock)) for word, engine in _ENGINES.items()
    }


TITLES = {
    "eager": CHANNELS_LAST,
    "eager-graph": "eager + CUDA graph",
    "compile": "compile",
    "autotune": "compile max-autotune",
    "freezing": "compile freezing",
    "cudnn": "cuDNN fused ops",
    "jax": "JAX",
    "ours": FUSED,
    "ours-graph": RECORDED,
    "ours-rf-graph": GRAPHED,
}


def in_turn(x: Tensor, count: int = INPUTS) -> Callable[[], Tensor]:
    """Equal tensors at different addresses, the next one at each call."""
    return itertools.cycle([x.clone() for _ in range(count)]).__next__


def _to_channels_last(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    last = torch.channels_last
    return copy.deepcopy(model).to(memory_format=last), in_turn(x.contiguous(memory_format=last))


def _eager(clock: Clock, model: nn.Module, x: Tensor) -> Prepared:
    model, images = _to_channels_last(model, x)
    return clock.launched(lambda: model(images()))


def _eager_graph(clock: Clock, model: nn.Module, x: Tensor) -> Prepared:
    model, images = _to_channels_last(model, x)
    return clock.recorded(lambda: model(images()))


def _compiled(clock: Clock, model: nn.Module, x: Tensor, options: Mapping[str, Any]) -> Prepared:
    """torch.compile with these options of inductor; a dry run stops before inductor."""
    import torch._dynamo.config
    import torch._inductor.config

    model, images = _to_channels_last(model, x)
    how = {} if clock.is_gpu else {"backend": "eager"}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, **how)
    with (
        torch._inductor.config.patch(dict(options)),
        torch._dynamo.config.patch(recompile_limit=RECOMPILES),
        torch.inference_mode(),
    ):
        compiled(images())
    return clock.recorded(lambda: compiled(images()))


def _cudnn(clock: Clock, model: nn.Module, x: Tensor) -> Prepared:
    """aten's convolutions with bias, ReLU and addition inside; a dry run has separate ones."""
    model, images = _to_channels_last(model, x)
    net = folded_net.folded_net(model)
    ops = folded_net.CUDNN if clock.is_gpu else folded_net.SEPARATE
    return clock.recorded(lambda: folded_net.run(net, images(), ops))


def _fused(clock: Clock, model: nn.Module, x: Tensor) -> Prepared:
    fused, images = _fuse(model, x)
    return clock.launched(lambda: fused(images()))


def _fused_graph(clock: Clock, model: nn.Module, x: Tensor) -> Prepared:
    fused, images = _fuse(model, x)
    try:
        return clock.recorded(lambda: fused(images()))
    except NotCapturable as why:  # its other ways can be timed
        raise Unavailable(str(why)) from why


def _fused_rf_graph(clock: Clock, model: nn.Module, x: Tensor) -> Prepared:
    """rf.graph copies images in and logits out, and launches one replay a call."""
    fused, images = _fuse(model, x)
    graphed = rf.graph(fused, images())
    if clock.is_gpu and graphed.reason is not None:
        raise Unavailable(f"rf.graph: {graphed.reason}")
    return clock.launched(lambda: graphed(images()))


def _fuse(model: nn.Module, x: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    return rf.fuse(model), in_turn(x.contiguous(memory_format=torch.channels_last))


_ENGINES: dict[str, Callable[[Clock, nn.Module, Tensor], Prepared]] = {
    "eager": _eager,
    "eager-graph": _eager_graph,
    "compile": functools.partial(_compiled, options={}),
    # What mode="max-autotune" sets, but for its own CUDA graphs: those here copy no images.
    "autotune": functools.partial(
        _compiled, options={"max_autotune": True, "coordinate_descent_tuning": True}
    ),
    "freezing": functools.partial(_compiled, options={"freezing": True}),
    "cudnn": _cudnn,
    "jax": gpu_jax.engine,
    "ours": _fused,
    "ours-graph": _fused_graph,
    "ours-rf-graph": _fused_rf_graph,
}
