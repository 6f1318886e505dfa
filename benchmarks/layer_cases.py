"""Measures one convolution: ours, oneDNN's, the machine's peak and the reading of its operands.

The four take turns (timing.interleave), so that a clock or a neighbour that changes hits all alike.
Weights are "warm" (the same at every call: wherever the caches keep them) or "cold" (copies that
together exceed L3 twice take turns, as the weights of a net do).
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import packing
from resnet_fused.check import dtype_name
from resnet_fused.recipe import ConvUnit

from . import onednn
from .accounting import arithmetic, direct_multiplications, is_winograd, multiplications
from .common import Runner, interleave, relative_error
from .layers import Layer

WARM, COLD = "warm", "cold"
PEAK_S = 0.002  # one measurement of the peak; a sample is many
WARMUP_S = 0.02
MOST_COPIES = 256

_ops = torch.ops.resnet_fused


@dataclass(frozen=True)
class Measured:
    """One layer at one batch size and dtype. Seconds are medians per call."""

    layer: Layer
    batch: int
    dtype: torch.dtype
    weights: str  # WARM | COLD
    plan: str
    why: str  # the sentence of the selection
    seconds: float
    peer_seconds: float | None  # oneDNN; None where it cannot run
    peak: float  # multiply-adds a second, in the arithmetic of the plan
    read_seconds: float  # for reading x, weights, residual and as much as the output once
    bytes: int  # that these have
    page_faults: float  # a call
    error: float  # relative L2 against fp64
    peer_error: float | None

    @property
    def gflops(self) -> float:
        """2e-9 multiply-adds a second of the direct convolution, whatever the plan makes of it."""
        return 2e-9 * direct_multiplications(self.layer, self.batch) / self.seconds

    @property
    def share(self) -> float:
        """Of the peak: the multiplications that the plan makes, over those possible in its time."""
        made = multiplications(self.plan, self.layer, self.batch)
        return made / self.peak / self.seconds

    @property
    def roofline(self) -> float:
        """The share that no kernel of this plan can exceed: multiplications or reads bind."""
        made = multiplications(self.plan, self.layer, self.batch) / self.peak
        return made / max(made, self.read_seconds)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as oneDNN."""
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds

    def record(self) -> dict[str, object]:
        """For JSON; times in milliseconds."""
        layer = self.layer
        return {
            "layer": layer.text,
            "name": layer.name,
            "stage": layer.stage,
            "count": layer.count,
            "batch": self.batch,
            "dtype": dtype_name(self.dtype),
            "weights": self.weights,
            "plan": self.plan,
            "why": self.why,
            "ms": 1e3 * self.seconds,
            "onednn_ms": None if self.peer_seconds is None else 1e3 * self.peer_seconds,
            "ratio_to_onednn": self.ratio,
            "gflops": self.gflops,
            "multiplications": multiplications(self.plan, layer, self.batch),
            "direct_multiplications": direct_multiplications(layer, self.batch),
            "peak_gflops": 2e-9 * self.peak,
            "share_of_peak": self.share,
            "winograd": is_winograd(self.plan),
            "roofline": self.roofline,
            "bytes": self.bytes,
            "read_ms": 1e3 * self.read_seconds,
            "page_faults": self.page_faults,
            "error": self.error,
            "onednn_error": self.peer_error,
        }


def measure(
    layer: Layer,
    batch: int,
    dtype: torch.dtype,
    *,
    weights: str = WARM,
    seconds: float = 1.0,
    rounds: int | None = None,
) -> Measured:
    """Times `layer` for about `seconds` (or `rounds` rounds), everything interleaved."""
    unit = layer.unit()
    with torch.inference_mode():
        x, residual = _operands(layer, batch, dtype)
        choice = packing.choose(unit.conv, dtype, layer.out_size, exact_nonfinite=False)
        first = packing.pack(unit, dtype, choice)
        copies = 1 if weights == WARM else _copies(first.weight)
        packed = [first] + [packing.pack(unit, dtype, choice) for _ in range(copies - 1)]
        ours = _in_turn([lambda p=p: p(x, residual) for p in packed])
        y = ours()
        exact = _exact(unit, dtype, x, residual)
        calls = {"ours": ours}
        peer_error = None
        if onednn.is_available(dtype):
            calls["oneDNN"] = onednn.prepacked(unit, dtype, x, residual, copies)
            peer_error = relative_error(_samples(calls["oneDNN"]()), exact)
        operands = [[dense(t) for t in (x, p.weight, residual, y) if t is not None] for p in packed]
        calls["read"] = _in_turn([lambda held=held: _ops.read_words(held) for held in operands])
        peaks: list[float] = []
        products = arithmetic(choice.plan)
        calls["peak"] = lambda: peaks.append(_ops.multiply_peak(PEAK_S, products))
        samples = interleave(
            {name: Runner(call, torch.inference_mode) for name, call in calls.items()},
            budget_s=seconds,
            rounds=rounds,
            warmup_s=WARMUP_S,
        )
        return Measured(
            layer=layer,
            batch=batch,
            dtype=dtype,
            weights=weights,
            plan=choice.plan,
            why=choice.reason,
            seconds=samples["ours"].median,
            peer_seconds=samples["oneDNN"].median if "oneDNN" in samples else None,
            peak=median(peaks),
            read_seconds=samples["read"].median,
            bytes=sum(t.numel() * t.element_size() for t in operands[0]),
            page_faults=_page_faults(ours),
            error=relative_error(_samples(y), exact),
            peer_error=peer_error,
        )


def dense(t: Tensor) -> Tensor:
    """A contiguous view of a dense channels_last tensor; anything contiguous as it is."""
    return t if t.is_contiguous() else t.movedim(-3, -1).contiguous()


def _operands(layer: Layer, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """x as a ReLU leaves it, and the residual, both (N, C, H, W) in channels_last."""
    generator = torch.Generator().manual_seed(1)

    def normal(channels: int, size: tuple[int, int]) -> Tensor:
        values = torch.randn(batch, channels, *size, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    x = normal(layer.in_channels, layer.in_size)
    x = x if layer.stage == 0 else x.relu_()
    return x, normal(layer.out_channels, layer.out_size) if layer.residual else None


def _in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """One of the calls after the other."""
    if len(calls) == 1:
        return calls[0]
    turn = -1

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % len(calls)
        return calls[turn]()

    return call


def _samples(y: Tensor) -> Tensor:
    """The first and the last image: enough to hold against fp64, which is slow."""
    return torch.cat([y[:1], y[-1:]])


def _exact(unit: ConvUnit, dtype: torch.dtype, x: Tensor, residual: Tensor | None) -> Tensor:
    """In fp64, from the weights and inputs as `dtype` holds them."""
    keywords = packing.conv_keywords(unit)
    act = keywords.pop("act")
    scale, shift = (t.double()[:, None, None] for t in packing.fold(unit))
    weight = unit.conv.weight.to(dtype).double()
    y = F.conv2d(_samples(x).double(), weight, None, **keywords) * scale + shift
    if residual is not None:
        y = y + _samples(residual).double()
    return y.relu() if act == "relu" else y


def _copies(weight: Tensor) -> int:
    size = weight.numel() * weight.element_size()
    return max(2, min(MOST_COPIES, math.ceil(2 * l3_bytes() / size)))


def l3_bytes(root: Path = Path("/")) -> int:
    """The last-level cache that the first processor sees; 32 MiB where the system does not say."""
    caches = sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [_size(path.read_text()) for path in caches]
    return max(sizes, default=32 << 20)


def _size(text: str) -> int:
    number, unit = text.strip()[:-1], text.strip()[-1]
    return int(number) << {"K": 10, "M": 20, "G": 30}[unit]


def _page_faults(call: Callable[[], object], calls: int = 5) -> float:
    """Minor page faults a call: the allocator takes fresh memory for outputs too large to keep."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
