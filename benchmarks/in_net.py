"""Where the time of a whole net goes: its modules timed one by one inside the net's run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

import resnet_fused as rf
from resnet_fused._fused import FusedModule
from resnet_fused._survey import join

from .accounting import direct_multiplications
from .layers import all_layers


@dataclass(frozen=True)
class Part:
    """One step of the net, in the order in which it runs."""

    name: str
    kind: str  # class of the module; "between": the run of the whole net less its parts
    backend: str  # what computed it, for fused modules
    seconds: float  # median
    multiplications: int  # of its direct convolutions

    def record(self) -> dict[str, object]:
        """For JSON; time in milliseconds."""
        return {
            "step": self.name,
            "kind": self.kind,
            "backend": self.backend,
            "ms": 1e3 * self.seconds,
            "multiplications": self.multiplications,
        }


def profile(model: nn.Module, x: Tensor, *, runs: int = 50) -> list[Part]:
    """Times every step of rf.fuse(model) on x (N, C, H, W), in `runs` runs of the whole net.

    model: a plain net whose outer modules are nn.Sequential. A clock is read between steps, so the
    caches are as they are in the net. Whole runs without clocks alternate with these; what they
    take beyond the parts is the last row, "between".
    """
    fused = rf.fuse(model)
    x = x.contiguous(memory_format=torch.channels_last)
    steps = list(_steps(fused, ""))
    times: list[list[float]] = [[] for _ in steps]
    whole: list[float] = []
    with torch.inference_mode():
        for run in range(runs + 3):
            start = time.perf_counter()
            fused(x)
            elapsed = time.perf_counter() - start
            stamps = _run(steps, x)
            if run >= 3:  # the first ones pack and warm up
                whole.append(elapsed)
                for i, seconds in enumerate(stamps):
                    times[i].append(seconds)
    layers = all_layers(model, x.shape[-1])
    parts = []
    for (name, module), seconds in zip(steps, times, strict=True):
        own = [layer for layer in layers if f"{layer.name}.".startswith(f"{name}.")]
        made = sum(direct_multiplications(layer, len(x)) for layer in own)
        parts.append(Part(name, type(module).__name__, _backend(module), median(seconds), made))
    rest = median(whole) - sum(part.seconds for part in parts)
    return [*parts, Part("", "between", "", rest, 0)]


def _steps(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that nested nn.Sequentials call, in order."""
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _steps(child, join(name, child_name))


def _run(steps: list[tuple[str, nn.Module]], x: Tensor) -> list[float]:
    seconds = []
    before = time.perf_counter()
    for _, module in steps:
        x = module(x)
        now = time.perf_counter()
        seconds.append(now - before)
        before = now
    return seconds


def _backend(module: nn.Module) -> str:
    return module.status().backend if isinstance(module, FusedModule) else ""
