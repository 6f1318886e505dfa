"""One convolution on a GPU with all that is behind it: ours, PyTorch's ops, cuDNN's fused op; and
where asked for, ours in each configuration that tune would measure.

Each is timed as replays of a CUDA graph in which inputs and residuals at different addresses,
together more than the level 2 cache holds twice, take turns; weights and outputs stay in that cache
where they fit.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_fused import packing, select
from resnet_fused.measure.compare import WrongResult
from resnet_fused.measure.gpu_timing import GRAPH_CALLS
from resnet_fused.ops import _cuda, _gpu
from resnet_fused.recipe import ConvUnit

from .common import Samples, Unavailable, error_limit, interleave, one_line, relative_error
from .folded_net import CUDNN, SEPARATE, Conv, Ops, folded_conv
from .gpu_engines import Clock
from .layer_cases import ends, exact, operands
from .layers import Layer
from .roofline import Ceilings, Work, layer_work

OURS, PYTORCH, CUDNN_FUSED = "fused", "PyTorch", "cuDNN fused op"
MOST_INPUTS = 32
WARMUP_S, SAMPLE_S = 0.02, 0.005


@dataclass(frozen=True)
class Row:
    """One layer. seconds: median of each way that could run, empty in a dry run."""

    layer: Layer
    batch: int
    dtype: torch.dtype
    plan: str
    why: str  # the sentence of the selection
    inputs: int  # that took turns
    errors: Mapping[str, float]  # relative L2 against fp64
    failed: Mapping[str, str]  # ways that could not run, and why
    seconds: Mapping[str, float]
    configurations: tuple[str, ...] = ()  # that are ways, too

    @property
    def work(self) -> Work:
        return layer_work(self.layer, self.batch)

    def record(self, ceilings: Ceilings | None) -> dict[str, object]:
        """For JSON; times in microseconds."""
        entry = {
            "layer": self.layer.text,
            "name": self.layer.name,
            "stage": self.layer.stage,
            "count": self.layer.count,
            "plan": self.plan,
            "why": self.why,
            "inputs": self.inputs,
            "multiplications": self.work.multiplications,
            "errors": dict(self.errors),
            "failed": dict(self.failed),
            "us": {
                way: 1e6 * seconds
                for way, seconds in self.seconds.items()
                if way not in self.configurations
            },
        }
        if self.configurations:
            us = {
                name: 1e6 * self.seconds[name]
                for name in set(self.configurations) & self.seconds.keys()
            }
            entry["configurations_us"] = dict(sorted(us.items(), key=lambda item: item[1]))
        if ceilings is not None and OURS in self.seconds:
            ours = self.seconds[OURS]
            floor = self.work.floor(self.dtype.itemsize, ceilings)
            entry |= {
                "tflops": 2e-12 * self.work.multiplications / ours,
                "share_of_matmul": self.work.multiplications / ceilings.multiply_adds / ours,
                "floor_us": 1e6 * floor,
                "share_of_floor": floor / ours,
                "ratio_to_pytorch": self._ratio(PYTORCH),
                "ratio_to_cudnn": self._ratio(CUDNN_FUSED),
            }
        return entry

    def _ratio(self, way: str) -> float | None:
        """How many times as fast as that way ours is."""
        return self.seconds[way] / self.seconds[OURS] if way in self.seconds else None


def measure(
    layer: Layer,
    batch: int,
    dtype: torch.dtype,
    clock: Clock,
    *,
    l2_bytes: int,
    seconds: float = 0.3,
    rounds: int | None = None,
    configurations: bool = False,
) -> Row:
    """Checks each way against fp64 and, on a GPU, times all for about `seconds` (or `rounds`).

    configurations: of the plan, if it is "cuda", are ways too; one that is wrong has failed.
    Raises WrongResult where ours is further from fp64 than twice PyTorch's own distance.
    """
    unit = _on(layer.unit(), clock.device, dtype)
    with torch.inference_mode():
        x, residual = operands(layer, batch, dtype, clock.device)
        choice = select.choose(packing.conv_shape(unit.conv, dtype, layer.out_size, batch))
        packed = packing.pack(unit, dtype, choice)
        truth = exact(unit, dtype, x, residual)
        sets = in_turn(x, residual, l2_bytes)
        folded = folded_conv(unit)
        ways: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
            OURS: packed,
            PYTORCH: lambda x, residual: _by(SEPARATE, folded, x, residual),
            CUDNN_FUSED: lambda x, residual: _by(CUDNN, folded, x, residual),
        }
        if not clock.is_gpu or (layer.act == "none" and residual is None):
            del ways[CUDNN_FUSED]  # there is no such op
        configured = _configured(packed, x) if configurations and choice.plan == "cuda" else {}
        ways |= configured
        calls = max(GRAPH_CALLS, len(sets))
        errors, failed, runners = {}, {}, {}
        for way, function in ways.items():
            turn = itertools.cycle(sets)
            try:
                runners[way] = clock.recorded(lambda f=function, t=turn: f(*next(t)), calls)
                errors[way] = relative_error(ends(runners[way].run()), truth)
            except Exception as error:
                if way == OURS:
                    raise
                runners.pop(way, None)
                failed[way] = one_line(error)
        _verify(layer, dtype, errors)
        for name in configured.keys() & runners.keys():
            if not errors[name] <= error_limit(errors[PYTORCH], dtype):
                failed[name] = f"its error against fp64 is {errors[name]:.2g}"
                del runners[name]
        samples: Mapping[str, Samples] = interleave(
            runners,
            budget_s=seconds,
            rounds=rounds,
            warmup_s=WARMUP_S if clock.is_gpu else 0.0,
            min_sample_s=SAMPLE_S if clock.is_gpu else 0.0,
        )
    return Row(
        layer=layer,
        batch=batch,
        dtype=dtype,
        plan=choice.plan,
        why=choice.reason,
        inputs=len(sets),
        errors=errors,
        failed=failed,
        seconds={way: s.median for way, s in samples.items()} if clock.is_gpu else {},
        configurations=tuple(configured),
    )


def _configured(
    packed: packing.PackedUnit, x: Tensor
) -> dict[str, Callable[[Tensor, Tensor | None], Tensor]]:
    """The plan "cuda" in each configuration that is worth measuring."""
    given = {name: v for name, v in packed.keywords.items() if name not in ("plan", "pool")}
    geometry = (given[name] for name in ("kernel_size", "stride", "padding", "dilation", "groups"))
    kind = _cuda.kind_of(x.dtype)
    channels = packed.scale.numel()
    sizes = _cuda.Sizes(tuple(x.shape), channels, *geometry, (), (1, 1), kind, x.device.index or 0)
    op = _gpu.conv_op("cuda")
    return {
        name: lambda x, residual, name=name: op(x, *packed.operands, residual, config=name, **given)
        for name in _cuda.ranked(sizes)
    }


def in_turn(
    x: Tensor, residual: Tensor | None, l2_bytes: int
) -> list[tuple[Tensor, Tensor | None]]:
    """Equal operands at different addresses, 2 to MOST_INPUTS, if need be beyond L2 twice."""
    size = sum(t.numel() * t.element_size() for t in (x, residual) if t is not None)
    count = max(2, min(MOST_INPUTS, math.ceil(2 * l2_bytes / size)))
    return [(x.clone(), None if residual is None else residual.clone()) for _ in range(count)]


def _on(unit: ConvUnit, device: torch.device, dtype: torch.dtype) -> ConvUnit:
    """There, with weights in `dtype`; what batch norm does to an output stays float32."""
    conv, bn = (copy.deepcopy(module).to(device) for module in (unit.conv, unit.bn))
    return ConvUnit(conv.to(dtype), bn, unit.act, unit.conv_name, unit.bn_name)


def _by(ops: Ops, folded: Conv, x: Tensor, residual: Tensor | None) -> Tensor:
    return ops.conv(x, folded) if residual is None else ops.add(x, folded, residual)


def _verify(layer: Layer, dtype: torch.dtype, errors: Mapping[str, float]) -> None:
    if PYTORCH not in errors:
        raise Unavailable("PyTorch's own convolution could not run")
    limit = error_limit(errors[PYTORCH], dtype)
    if not errors[OURS] <= limit:
        raise WrongResult(
            f"{layer.text}: relative error against fp64 must be at most {limit:.2g}, "
            f"got {errors[OURS]:.2g}"
        )
