"""One case of bench_gpu: a net, a dtype and a batch, through all engines and layer by layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resnet_fused import models, reference, select, tuned
from resnet_fused.measure.compare import verified
from resnet_fused.measure.networks import draw_statistics
from resnet_fused.triton_kernels.device import device_of

from . import gpu_layers, record
from .cases import Case
from .common import (
    CHANNELS_LAST,
    Result,
    exact_logits,
    interleave,
    one_line,
    plain_net,
    random_images,
    with_samples,
)
from .gpu_engines import TITLES, Clock, engines
from .layers import distinct_layers
from .roofline import Ceilings, ceilings, net_floor, net_work

DTYPES = ("bfloat16", "float16")
OnStage = Callable[[str, int, int], None]
WARMUP_S, SAMPLE_S = 0.1, 0.02
DRY_SIZE, DRY_BATCH, DRY_CLASSES = 32, 2, 10


@dataclass(frozen=True)
class Setup:
    """How all cases of one run are measured. only: words of the engines."""

    only: tuple[str, ...]
    dry_run: bool = False
    layers: bool = True
    configurations: bool = False  # of each layer, too
    size: int = 224
    seconds: float = 6.0
    rounds: int | None = None

    @property
    def clock(self) -> Clock:
        return Clock(torch.device("cpu" if self.dry_run else "cuda"))

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "dry_run": self.dry_run,
            "size": DRY_SIZE if self.dry_run else self.size,
            "seconds": self.seconds,
            "rounds": self.rounds,
            "engines": [TITLES[word] for word in self.only],
            "layers": self.layers,
            "configurations": self.configurations,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
        }


def measure(case: Case, setup: Setup, on_stage: OnStage) -> record.Record:
    """The case's entry in the record. Raises WrongResult, and whatever stops ours in the net.

    Layers where ours fails are listed under "failures": the rest is kept, time on a GPU is scarce.
    """
    clock, dtype = setup.clock, getattr(torch, case.dtype)
    if setup.dry_run:
        net, size, batch = tiny_net(case.model), DRY_SIZE, min(case.batch, DRY_BATCH)
    else:
        net, size, batch = plain_net(case.model), setup.size, case.batch
    net = net.to(clock.device, dtype)
    limits = None
    if clock.is_gpu:
        on_stage("matrix product and copy, the ceilings", 0, 0)
        limits = ceilings(dtype, clock.device, clock.launched)
    results = _nets(net, size, batch, dtype, setup, on_stage)
    entry = record.case_entry(case, results, {})
    entry |= _floor_entry(net, size, batch, dtype, limits)
    entry |= {"selection": _selection(clock), "layers": [], "failures": []}
    for layer in distinct_layers(net, size) if setup.layers else ():
        on_stage(f"layer {layer.text}", 0, 0)
        try:
            row = gpu_layers.measure(
                layer,
                batch,
                dtype,
                clock,
                l2_bytes=_l2_bytes(clock),
                rounds=1 if setup.dry_run else setup.rounds,
                configurations=setup.configurations,
            )
        except Exception as error:
            entry["failures"].append(f"{layer.text}: {one_line(error)}")
        else:
            entry["layers"].append(row.record(limits))
    return entry


def tiny_net(name: str) -> nn.Module:
    """A net of the kind with two stages of one block, 16 and 32 channels wide, in eval mode."""
    basic = name in ("resnet18", "resnet34")
    block, expansion = (reference.Residual, 1) if basic else (reference.Bottleneck, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        first = models.resnet_block(16, 16, 1, True, block=block, expansion=expansion)
        second = models.resnet_block(16 * expansion, 32, 1, block=block, expansion=expansion)
        head = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(32 * expansion, DRY_CLASSES)
        net = nn.Sequential(stem, nn.Sequential(*first), nn.Sequential(*second), *head)
        draw_statistics(net)
    return net.eval()


def _nets(
    net: nn.Module,
    size: int,
    batch: int,
    dtype: torch.dtype,
    setup: Setup,
    on_stage: OnStage,
) -> list[Result]:
    clock = setup.clock
    x = random_images(batch, size=size).to(clock.device, dtype)
    on_stage("float64, to compare with", 0, 0)
    exact = exact_logits(net, x)
    table = engines(clock)
    chosen = dict(table[word] for word in setup.only)
    runners, results = verified(net, x, exact, chosen, standard=CHANNELS_LAST, on_stage=on_stage)
    samples = interleave(
        runners,
        budget_s=setup.seconds,
        rounds=1 if setup.dry_run else setup.rounds,
        warmup_s=0.0 if setup.dry_run else WARMUP_S,
        min_sample_s=0.0 if setup.dry_run else SAMPLE_S,
        on_round=lambda done, total: on_stage("timing, interleaved", done, total),
    )
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # the next case's nets share the code of these, not their graphs
    if setup.dry_run:  # times of tiny nets on a CPU say nothing
        return [
            Result(r.engine, batch, error=r.error, reason=r.reason or "dry run")
            for r in results.values()
        ]
    return with_samples(results, samples)


def _floor_entry(
    net: nn.Module, size: int, batch: int, dtype: torch.dtype, limits: Ceilings | None
) -> dict[str, Any]:
    """ceilings and floor_ms, None in a dry run; the net's multiply-adds in any case."""
    steps = net_work(net, size, batch)
    floor = None if limits is None else 1e3 * net_floor(steps, dtype.itemsize, limits)
    return {
        "ceilings": None if limits is None else limits.record(),
        "multiplications": sum(step.multiplications for step in steps),
        "floor_ms": floor,
    }


def _selection(clock: Clock) -> dict[str, Any]:
    """What our plans were chosen by: a plan in force, and how many answers `tune` has given."""
    answers = tuned.answers("cuda" if clock.is_gpu else "cpu")
    return {"force": select.force(), "tuned": len(answers or ())}


def _l2_bytes(clock: Clock) -> int:
    return device_of(torch.cuda.current_device()).l2_bytes if clock.is_gpu else 0
