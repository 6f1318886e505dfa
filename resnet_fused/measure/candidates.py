"""One convolution by every plan that can compute it: verified against float64, then timed.

A candidate is a plan or, on a GPU, one with a configuration: "triton 128x64x64 warps 4 stages 4".

The operands are random, the same at every measurement. Each call takes other weights than the one
before: copies that together are as large as all packed weights of the model, so that they come from
the cache, or the memory, from which they come in the model. With one copy, plans with large weights
would look faster than they are there. On a GPU calls are timed as replays of a CUDA graph; images
stay where the caches keep them, as in a model, where the layer before has just written them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..conv_shape import Geometry
from ..ops import _gpu
from ..select import ConvShape
from .error import CHUNK, GRANTED, error_limit
from .gpu_timing import GraphRunner
from .timing import Runner, Samples, Timed, interleave

WARMUP_S = 0.05
MOST_WEIGHT_BYTES = 128 << 20  # beyond that they come from memory whatever the caches are
# A kernel that is right but inexact is off by twice or four times the limit; a wrong tap, tile or
# channel by hundreds.
WRONG = 16
# On a busy machine medians differ by chance. A plan displaces the one that the rule names if it is
# faster by more than 2% and in more than four rounds of five.
MARGIN, SHARE = 0.98, 0.8
_TINY = 1e-30  # an eps that leaves 1 what it is: torch 2.11's batch norm takes no zero

_ops = torch.ops.resnet_fused


@dataclass(frozen=True)
class ConvCall:
    """A convolution as a model calls it: shape with batch, zero padding, epilogue.

    pool: with a stem's max-pool, which some kernels compute in the same pass.
    """

    shape: ConvShape
    padding: tuple[int, int]
    act: str
    residual: bool
    pool: bool = False

    @property
    def in_size(self) -> tuple[int, int]:
        """Rows and columns of the smallest input that gives the output."""
        s = self.shape
        sides = zip(s.out_size, s.kernel, s.stride, self.padding, s.dilation, strict=True)
        rows, columns = (max(1, (n - 1) * q + d * (k - 1) + 1 - 2 * p) for n, k, q, p, d in sides)
        return rows, columns

    @property
    def device(self) -> torch.device:
        s = self.shape
        return torch.device(s.device, s.index) if s.device == "cuda" else torch.device(s.device)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        s = self.shape
        return (s.out_channels, s.in_channels // s.groups, *s.kernel)


@dataclass(frozen=True)
class Measured:
    """plan: the fastest. ms: plan -> median in milliseconds; None where it is not exact enough to
    be timed: its error is above `limit`. errors: plan -> relative L2 against float64.
    """

    plan: str
    ms: dict[str, float | None]
    errors: dict[str, float]
    limit: float


class WrongCandidate(RuntimeError):
    """A plan computes something else than the convolution on this machine. candidate: which."""

    def __init__(self, candidate: str, text: str) -> None:
        super().__init__(text)
        self.candidate = candidate


def measure(
    call: ConvCall,
    plans: Sequence[str],
    standard: str,
    *,
    allow: Sequence[str] = (),
    weight_bytes: int = 0,
    seconds: float = 1.0,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Times `plans` on one convolution, interleaved, those that are exact enough.

    standard: the plan that is kept unless another is faster beyond chance.
    allow: plans to be timed whatever their error, short of being wrong.
    weight_bytes: of all packed weights of the model.
    seconds: for the timed rounds together. on_round(done, total) is called after each.
    Raises WrongCandidate, before anything is timed.
    """
    # Whatever the caller's model runs under, this computes in the dtype of the call.
    with torch.inference_mode(), torch.autocast(call.shape.device, enabled=False):
        o = _operands(call)
        errors, limit = _verify(call, o, plans)
        exact = [plan for plan in plans if errors[plan] <= limit or plan in allow]
        runners = {plan: _timed(call, _runner(call, o, plan, weight_bytes)) for plan in exact}
        samples = interleave(runners, budget_s=seconds, warmup_s=WARMUP_S, on_round=on_round)
    # Four digits, as much as a clock gives here and a file should hold.
    ms = {p: float(f"{1e3 * samples[p].median:.4g}") if p in samples else None for p in plans}
    return Measured(_fastest(samples, standard), ms, errors, limit)


def run_once(call: ConvCall, candidate: str) -> Tensor:
    """What the candidate makes of the operands that `measure` would give it."""
    with torch.inference_mode(), torch.autocast(call.shape.device, enabled=False):
        o = _operands(call)
        return _run(call, o, candidate, _pack(call, o, candidate))


def _fastest(samples: Mapping[str, Samples], standard: str) -> str:
    if standard not in samples:
        return min(samples, key=lambda plan: samples[plan].median, default=standard)
    usual = samples[standard]

    def beats(plan: str) -> bool:
        pairs = zip(samples[plan].seconds, usual.seconds, strict=True)
        faster = sum(ours < theirs for ours, theirs in pairs)
        return samples[plan].median < MARGIN * usual.median and faster > SHARE * len(usual.seconds)

    return min(filter(beats, samples), key=lambda plan: samples[plan].median, default=standard)


@dataclass(frozen=True)
class _Operands:
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None


def _operands(call: ConvCall) -> _Operands:
    s, g = call.shape, torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=g).to(s.dtype).to(call.device)

    def image(channels: int, size: tuple[int, int]) -> Tensor:
        return draw(call.shape.batch, *size, channels).movedim(-1, 1)  # channels_last

    weight = draw(*call.weight_shape)
    wide = torch.float64 if s.dtype == torch.float64 else torch.float32
    return _Operands(
        x=image(s.in_channels, call.in_size),
        weight=weight / weight[0].numel() ** 0.5,
        scale=(torch.rand(s.out_channels, generator=g) + 0.5).to(wide).to(call.device),
        shift=torch.randn(s.out_channels, generator=g).to(wide).to(call.device),
        residual=image(s.out_channels, s.out_size) if call.residual else None,
    )


def _keywords(call: ConvCall) -> dict:
    s = call.shape
    keywords = {"stride": s.stride, "padding": call.padding, "dilation": s.dilation}
    return keywords | {"groups": s.groups, "act": call.act}


def split_name(candidate: str) -> tuple[str, str]:
    """The plan of a candidate, and its configuration, "" for the plan's own choice."""
    plan, _, config = candidate.partition(" ")
    return plan, config


def _pack(call: ConvCall, o: _Operands, candidate: str) -> Tensor:
    return _ops.pack_conv(o.weight, call.shape.groups, plan=split_name(candidate)[0])


def _run(call: ConvCall, o: _Operands, candidate: str, packed: Tensor) -> Tensor:
    plan, config = split_name(candidate)
    operands = (o.x, packed, o.scale, o.shift, o.residual)
    keywords = _keywords(call) | {"kernel_size": call.shape.kernel}
    if config:
        return _pooled(call, _gpu.conv_op(plan)(*operands, config=config, **keywords))
    if call.shape.device == "cuda" and plan != "torch" and not pools_at_once(call, plan):
        return _pooled(call, _gpu.conv_by_rule(plan, *operands, **keywords))
    return _ops.conv_bn_act_packed(*operands, plan=plan, pool=call.pool, **keywords)


def pools_at_once(call: ConvCall, plan: str) -> bool:
    """Whether one kernel of the plan computes the max-pool too; it has no configurations."""
    s = call.shape
    size = (s.batch, s.in_channels, *call.in_size)
    geometry = Geometry(s.kernel, s.stride, call.padding, s.dilation, s.groups)
    where = (call.device, s.dtype, size, s.out_channels)
    return call.pool and _gpu.pools_at_once(plan, *where, geometry)


def _pooled(call: ConvCall, y: Tensor) -> Tensor:
    return reference.max_pool(y) if call.pool else y


def _timed(call: ConvCall, run: Callable[[], Tensor]) -> Timed:
    return GraphRunner(run, call.device) if call.shape.device == "cuda" else Runner(run)


def _runner(call: ConvCall, o: _Operands, plan: str, weight_bytes: int) -> Callable[[], Tensor]:
    """A call that goes through its copies of the packed weights in turn."""
    packed = [_pack(call, o, plan)]
    size = packed[0].numel() * packed[0].element_size()
    copies = -(-min(weight_bytes, MOST_WEIGHT_BYTES) // size)
    # Packed, not cloned: pack_conv asks for huge pages.
    packed += [_pack(call, o, plan) for _ in range(copies - 1)]
    turns = itertools.cycle(packed)
    return lambda: _run(call, o, plan, next(turns))


def _verify(call: ConvCall, o: _Operands, plans: Sequence[str]) -> tuple[dict[str, float], float]:
    """Each plan's error, and what it may be."""
    exact = _exact(call, o)
    eager = _distance(_eager(call, o), exact)
    limit = error_limit(eager.relative, call.shape.dtype)
    # One wrong pixel among millions hardly shows in the norm.
    furthest = eager.largest + GRANTED[call.shape.dtype] * float(exact.abs().amax())
    errors = {}
    for plan in plans:
        found = _distance(_run(call, o, plan, _pack(call, o, plan)), exact)
        if not (found.relative <= WRONG * limit and found.largest <= WRONG * furthest):
            raise WrongCandidate(
                plan,
                f"tune: {plan} on {call.shape}, batch {call.shape.batch}: the error against "
                f"float64 must be at most {limit:.2g}, got {found.relative:.2g}, "
                f"{found.largest:.2g} in one element",
            )
        errors[plan] = found.relative
    return errors, limit


@dataclass(frozen=True)
class _Distance:
    relative: float  # L2, NaN where y is not finite
    largest: float  # of one element


def _distance(y: Tensor, exact: Tensor) -> _Distance:
    squares, largest = 0.0, 0.0
    for ours, theirs in zip(y.split(CHUNK), exact.split(CHUNK), strict=True):
        difference = ours.double() - theirs
        squares += float(difference.square().sum())
        largest = max(largest, float(difference.abs().amax()))
    return _Distance(squares**0.5 / (float(exact.norm()) or 1.0), largest)


def _exact(call: ConvCall, o: _Operands) -> Tensor:
    """In float64, a few images at a time."""
    weight, scale, shift = (t.double() for t in (o.weight, o.scale, o.shift))
    parts = []
    for i in range(0, call.shape.batch, CHUNK):
        images = slice(i, i + CHUNK)
        residual = None if o.residual is None else o.residual[images].double()
        x = o.x[images].double()
        y = reference.conv_bn_act(x, weight, scale, shift, residual, **_keywords(call))
        parts.append(_pooled(call, y))
    return torch.cat(parts)


def _eager(call: ConvCall, o: _Operands) -> Tensor:
    """What plain modules compute: each operation rounds."""
    s = call.shape
    y = F.conv2d(o.x, o.weight, None, s.stride, call.padding, s.dilation, s.groups)
    zero, one = torch.zeros_like(o.scale), torch.ones_like(o.scale)
    y = F.batch_norm(y, zero, one, o.scale, o.shift, eps=_TINY)
    if o.residual is not None:
        y += o.residual
    return _pooled(call, F.relu(y) if call.act == "relu" else y)
