"""Measures one convolution: ours, oneDNN's, the machine's peak, moving its operands, a mere call.

They take turns (timing.interleave), so that a clock or a neighbour that changes hits all alike.
Weights are "warm" (the same at every call: wherever the caches keep them) or "cold" (copies that
together exceed L3 twice take turns, as the weights of a net do).
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import packing, select
from resnet_fused.check import dtype_name
from resnet_fused.measure.peak import multiply_peak
from resnet_fused.recipe import ConvUnit

from .accounting import arithmetic, direct_multiplications, multiplications, rows
from .common import Runner, interleave, relative_error
from .layers import Layer
from .onednn import in_turn, is_available, prepacked

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
    threads: int
    plan: str
    why: str  # the sentence of the selection
    seconds: float
    peer_seconds: float | None  # oneDNN, the faster of its two ways; None where it cannot run
    peak: float  # multiply-adds a second, in the arithmetic of the plan
    read_seconds: float  # for reading x, weights, residual and as much as the output once
    move_seconds: float  # for copying the pixels of x that are used and writing the output
    call_seconds: float  # a call with hardly anything to compute
    weight_bytes: int  # packed
    map_bytes: int  # x, residual and output
    output_bytes: int
    page_faults: float  # a call
    error: float  # relative L2 against fp64
    peer_error: float | None

    @property
    def multiplications(self) -> int:
        """That the plan makes."""
        return multiplications(self.plan, self.layer, self.batch)

    @property
    def rows(self) -> int:
        """Of the plan's matrix product: output pixels or tiles."""
        return rows(self.plan, self.layer, self.batch)

    @property
    def values(self) -> int:
        """Of the output."""
        height, width = self.layer.out_size
        return self.batch * height * width * self.layer.out_channels

    @property
    def gflops(self) -> float:
        """Of the direct convolution, whatever the plan makes of it; a multiply-add is two."""
        return 2e-9 * direct_multiplications(self.layer, self.batch) / self.seconds

    @property
    def share(self) -> float:
        """Of the peak: the multiplications that the plan makes, over those possible in its time."""
        return self.multiplications / self.peak / self.seconds

    @property
    def limit(self) -> float:
        """The share that no kernel of this plan can exceed: a call, then multiplying or reading."""
        made = self.multiplications / self.peak
        return made / (max(made, self.read_seconds) + self.call_seconds)

    @property
    def ratio(self) -> float | None:
        """How many times as fast as oneDNN."""
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds

    def record(self) -> dict[str, object]:
        """For JSON; times in milliseconds."""
        return {
            "layer": self.layer.text,
            "name": self.layer.name,
            "stage": self.layer.stage,
            "count": self.layer.count,
            "batch": self.batch,
            "dtype": dtype_name(self.dtype),
            "weights": self.weights,
            "plan": self.plan,
            "why": self.why,
            "ms": 1e3 * self.seconds,
            "onednn_ms": None if self.peer_seconds is None else 1e3 * self.peer_seconds,
            "ratio_to_onednn": self.ratio,
            "gflops": self.gflops,
            "multiplications": self.multiplications,
            "direct_multiplications": direct_multiplications(self.layer, self.batch),
            "peak_gflops": 2e-9 * self.peak,
            "share_of_peak": self.share,
            "limit": self.limit,
            "read_ms": 1e3 * self.read_seconds,
            "move_ms": 1e3 * self.move_seconds,
            "call_ms": 1e3 * self.call_seconds,
            "weight_bytes": self.weight_bytes,
            "map_bytes": self.map_bytes,
            "page_faults": self.page_faults,
            "error": self.error,
            "onednn_error": self.peer_error,
        }


@dataclass(frozen=True, eq=False)
class Calls:
    """What is timed of one layer, ready to be called, and what it works on."""

    choice: select.Choice
    weight: Tensor  # packed
    maps: list[Tensor]  # x, the residual if there is one, the output, each as it lies in memory
    exact: Tensor  # the first and last image of the result in fp64
    ours: Callable[[], Tensor]
    peers: dict[str, Callable[[], Tensor]]  # oneDNN's ways, none where it cannot run
    read: Callable[[], object]  # reads maps and weights once
    move: Callable[[], object]  # copies the pixels of x that are used, writes the output


def prepare(layer: Layer, batch: int, dtype: torch.dtype, weights: str = WARM) -> Calls:
    """Packs the weights for both, as many copies as `weights` asks for, and runs ours once."""
    unit = layer.unit()
    x, residual = operands(layer, batch, dtype)
    choice = select.choose(packing.conv_shape(unit.conv, dtype, layer.out_size, batch))
    first = packing.pack(unit, dtype, choice)
    copies = 1 if weights == WARM else copies_beyond_l3(_bytes(first.weight))
    packed = [first] + [packing.pack(unit, dtype, choice) for _ in range(copies - 1)]
    ours = in_turn([lambda p=p: p(x, residual) for p in packed])
    maps = [_flat(t) for t in (x, residual, ours()) if t is not None]
    return Calls(
        choice=choice,
        weight=first.weight,
        maps=maps,
        exact=exact(unit, dtype, x, residual),
        ours=ours,
        peers=prepacked(unit, dtype, x, residual, copies) if is_available(dtype) else {},
        read=in_turn([lambda p=p: _ops.read_words([*maps, _flat(p.weight)]) for p in packed]),
        move=_move(layer, x, maps[-1]),
    )


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
    with torch.inference_mode():
        calls = prepare(layer, batch, dtype, weights)
        errors = [relative_error(ends(call()), calls.exact) for call in _first_of_each(calls)]
        products, peaks = getattr(torch, arithmetic(calls.choice.plan)), []
        timed = {
            "ours": calls.ours,
            **calls.peers,
            "read": calls.read,
            "move": calls.move,
            "call": smallest_call(),
            "peak": lambda: peaks.append(multiply_peak(products, PEAK_S)),
        }
        samples = interleave(
            {name: Runner(call, torch.inference_mode) for name, call in timed.items()},
            budget_s=seconds,
            rounds=rounds,
            warmup_s=WARMUP_S,
        )
        return Measured(
            layer=layer,
            batch=batch,
            dtype=dtype,
            weights=weights,
            threads=torch.get_num_threads(),
            plan=calls.choice.plan,
            why=calls.choice.reason,
            seconds=samples["ours"].median,
            peer_seconds=min((samples[name].median for name in calls.peers), default=None),
            peak=median(peaks),
            read_seconds=samples["read"].median,
            move_seconds=samples["move"].median,
            call_seconds=samples["call"].median,
            weight_bytes=_bytes(calls.weight),
            map_bytes=sum(map(_bytes, calls.maps)),
            output_bytes=_bytes(calls.maps[-1]),
            page_faults=_page_faults(calls.ours),
            error=errors[0],
            peer_error=errors[1] if calls.peers else None,
        )


def operands(
    layer: Layer, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """x as a ReLU leaves it, and the residual, both (N, C, H, W) in channels_last."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(channels: int, size: tuple[int, int]) -> Tensor:
        values = torch.randn(batch, channels, *size, generator=generator, device=device).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    x = normal(layer.in_channels, layer.in_size)
    x = x if layer.stage == 0 else x.relu_()
    return x, normal(layer.out_channels, layer.out_size) if layer.residual else None


def _move(layer: Layer, x: Tensor, y: Tensor) -> Callable[[], object]:
    """What no direct kernel can do while it multiplies."""
    used = x if max(layer.kernel) > 1 else x[..., :: layer.stride[0], :: layer.stride[1]]
    rows, results = torch.empty_like(used), torch.empty_like(y)
    return lambda: (rows.copy_(used), results.zero_())


def copies_beyond_l3(size: int) -> int:
    """How many copies of `size` bytes exceed L3 twice; 2 to MOST_COPIES, so small ones do not."""
    return max(2, min(MOST_COPIES, math.ceil(2 * l3_bytes() / size)))


def l3_bytes(root: Path = Path("/")) -> int:
    """The largest cache of the first processor; 32 MiB where the system does not say."""
    units = {"K": 10, "M": 20, "G": 30}
    texts = [
        path.read_text().strip()
        for path in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max((int(text[:-1]) << units[text[-1]] for text in texts), default=32 << 20)


@cache
def smallest_call() -> Callable[[], Tensor]:
    """What any convolution pays: this one has 64 pixels and 32 channels, enough for all threads."""
    one = (1, 1)
    layer = Layer(32, 32, (8, 8), one, one, (0, 0), one, 1, "relu", False, 0, "")
    unit = layer.unit()
    with torch.inference_mode(), select.forced("direct"):
        x, _ = operands(layer, 1, torch.float32)
        choice = select.choose(packing.conv_shape(unit.conv, x.dtype, layer.out_size))
        packed = packing.pack(unit, x.dtype, choice)
    return lambda: packed(x)


def _first_of_each(calls: Calls) -> list[Callable[[], Tensor]]:
    """Ours and oneDNN's plainest way; the other one adds to its own output."""
    return [calls.ours, *list(calls.peers.values())[:1]]


def _page_faults(call: Callable[[], object], calls: int = 5) -> float:
    """Minor page faults a call: the allocator takes fresh memory for outputs too large to keep."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


def exact(unit: ConvUnit, dtype: torch.dtype, x: Tensor, residual: Tensor | None) -> Tensor:
    """The ends of the result in fp64, from the weights and inputs as `dtype` holds them."""
    keywords = packing.conv_keywords(unit)
    act = keywords.pop("act")
    scale, shift = (t.double()[:, None, None] for t in packing.fold(unit))
    weight = unit.conv.weight.to(dtype).double()
    y = F.conv2d(ends(x).double(), weight, None, **keywords) * scale + shift
    if residual is not None:
        y = y + ends(residual).double()
    return y.relu() if act == "relu" else y


def ends(y: Tensor) -> Tensor:
    """The first and the last image: enough to hold against fp64, which is slow."""
    return torch.cat([y[:1], y[-1:]])


def _flat(t: Tensor) -> Tensor:
    """A dense tensor, channels_last or not, as it lies in memory."""
    return t if t.is_contiguous() else t.movedim(-3, -1)


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()
