"""How does the fused net scale with threads, and how could it at best?

python -m benchmarks.bench_threads            ResNet-18, float32 and bfloat16, batch 1 and 8
python -m benchmarks.bench_threads --check    exit status 1 where two threads gain too little

The limit is the roofline's: a convolution takes at least its multiplications over the multiply
peak, and at least the bytes of its weights over the read bandwidth. Both are measured with each
number of threads; weights are read in a circle as large as all the net's, so whichever cache or
memory can hold them answers. The times of all convolutions add up, and the limit of the speed-up is
the sum with one thread over the sum with several. It is 2 with two threads where multiplications
decide, less where one thread alone takes much of the memory's bandwidth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.table import Table
from torch import Tensor, nn

from resnet_fused import models, ops, packing, select
from resnet_fused.check import dtype_name
from resnet_fused.commands.options import DTYPES, FILE, SECONDS, BatchSizes
from resnet_fused.commands.threads import torch_threads
from resnet_fused.measure.peak import multiply_peak, read_bandwidth
from resnet_fused.ops._shapes import packed_dtype, packed_shape

from .accounting import arithmetic, multiplications
from .arguments import Words
from .common import (
    FUSED,
    Runner,
    Samples,
    console,
    engines,
    interleave,
    machine,
    milliseconds,
    plain_net,
    prepare,
    progress_bar,
    random_images,
    titled_table,
)
from .layers import all_layers
from .when import now

GOAL = 1.7  # speed-up with two threads at batch 1
SHARE = 0.9  # of the limit, which is enough where the limit is below the goal


@dataclass(frozen=True)
class Work:
    """What a net's convolutions multiply and read: (multiplications, their dtype, bytes)."""

    parts: tuple[tuple[int, torch.dtype, int], ...]

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, _, size in self.parts)

    def seconds(self, peaks: dict[torch.dtype, float], bandwidth: float) -> float:
        """On the roofline; peaks in multiply-adds, bandwidth in bytes a second."""
        return sum(max(made / peaks[dtype], size / bandwidth) for made, dtype, size in self.parts)


@dataclass(frozen=True)
class Scaling:
    """One net, dtype and batch with one number of threads. Seconds per call."""

    dtype: torch.dtype
    batch: int
    threads: int
    samples: Samples
    speed_up: float  # over one thread
    bandwidth: float  # bytes a second
    peaks: dict[torch.dtype, float]
    roofline: float  # seconds
    limit: float  # of speed_up

    @property
    def enough(self) -> bool | None:
        """Whether the goal is reached; None where there is none."""
        if self.threads != 2 or self.batch != 1:
            return None
        return self.speed_up >= min(GOAL, SHARE * self.limit)

    def record(self) -> dict[str, object]:
        """For JSON; times in milliseconds."""
        q1, q3 = self.samples.quartiles
        return {
            "dtype": dtype_name(self.dtype),
            "batch": self.batch,
            "threads": self.threads,
            "median_ms": 1e3 * self.samples.median,
            "q1_ms": 1e3 * q1,
            "q3_ms": 1e3 * q3,
            "speed_up": self.speed_up,
            "limit": self.limit,
            "roofline_ms": 1e3 * self.roofline,
            "read_gb_per_s": 1e-9 * self.bandwidth,
            "peak_gmac_per_s": {dtype_name(t): 1e-9 * p for t, p in self.peaks.items()},
            "enough": self.enough,
        }


def work_of(net: nn.Module, dtype: torch.dtype, batch: int, size: int) -> Work:
    """Of the fused net, by the plans that are chosen for its convolutions on this machine."""
    parts = []
    for layer in all_layers(net, size):
        shape = packing.conv_shape(layer.unit().conv, dtype, layer.out_size, batch)
        plan = select.choose(shape).plan
        ours = plan != "torch"
        weight = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel)
        held = packed_dtype(plan, dtype)
        count = torch.Size(packed_shape(weight, layer.groups, plan)).numel()
        products = getattr(torch, arithmetic(plan)) if ours else _widest(dtype)
        parts.append((multiplications(plan, layer, batch), products, count * held.itemsize))
    return Work(tuple(parts))


def measure(
    net: nn.Module,
    dtype: torch.dtype,
    x: Tensor,
    counts: tuple[int, ...],
    seconds: float,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> list[Scaling]:
    """One Scaling a number of threads, timed in turn; counts begin with 1."""
    work = work_of(net, dtype, len(x), x.shape[-1])
    runner, _ = prepare(FUSED, engines()[FUSED], net, x)
    timed = {str(n): Runner(runner.call, _with_threads(n, runner)) for n in counts}
    samples = interleave(timed, budget_s=seconds, on_round=on_round)
    results: list[Scaling] = []
    for n in counts:
        with torch_threads(n):
            bandwidth = read_bandwidth(work.weight_bytes, seconds=0.5)
            peaks = {t: multiply_peak(t, seconds=0.2) for t in {part[1] for part in work.parts}}
        roofline = work.seconds(peaks, bandwidth)
        one = results[0] if results else None
        results.append(
            Scaling(
                dtype=dtype,
                batch=len(x),
                threads=n,
                samples=samples[str(n)],
                speed_up=one.samples.median / samples[str(n)].median if one else 1.0,
                bandwidth=bandwidth,
                peaks=peaks,
                roofline=roofline,
                limit=one.roofline / roofline if one else 1.0,
            )
        )
    return results


def _with_threads(count: int, runner: Runner) -> Callable[[], AbstractContextManager]:
    @contextmanager
    def context() -> Iterator[None]:
        with torch_threads(count), runner.context():
            yield

    return context


def _widest(dtype: torch.dtype) -> torch.dtype:
    """What PyTorch's convolution multiplies at best here, of those whose peak can be measured."""
    bf16 = dtype == torch.bfloat16 and ops.cpu_isa() == "avx512bf16"
    return torch.bfloat16 if bf16 else torch.float32


def _table(title: str, results: list[Scaling]) -> Table:
    table = titled_table(title)
    headings = (
        "dtype",
        "batch",
        "threads",
        "ms",
        "quartiles",
        "speed-up",
        "limit",
        "GB/s",
        "GMAC/s",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for r in results:
        q1, q3 = (milliseconds(quartile) for quartile in r.samples.quartiles)
        colour = {True: "green", False: "red", None: "default"}[r.enough]
        table.add_row(
            dtype_name(r.dtype),
            str(r.batch),
            str(r.threads),
            milliseconds(r.samples.median),
            f"{q1}-{q3}",
            f"[{colour}]{r.speed_up:.2f}x[/{colour}]",
            f"{r.limit:.2f}x",
            f"{1e-9 * r.bandwidth:.1f}",
            f"{1e-9 * max(r.peaks.values()):.0f}",
        )
    return table


class Counts(BatchSizes):
    """ "1,2,4": numbers of threads, to which 1 belongs."""

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        return tuple(sorted({1, *super().convert(value, param, ctx)}))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", type=click.Choice(list(models.BUILDERS)), default="resnet18")
@click.option("--batches", type=BatchSizes(), default="1,8")
@click.option(
    "--dtypes", "names", type=Words(DTYPES), default="float32,bfloat16", help="Precisions."
)
@click.option(
    "--threads", "counts", type=Counts(), help="Of each; 1 belongs to them [default: 1 to torch's]."
)
@click.option("--size", type=click.IntRange(min=32), default=224, help="Height and width.")
@click.option("--seconds", type=SECONDS, default=8.0, help="Timed, per batch.")
@click.option("--check", is_flag=True, help=f"Batch 1: {GOAL}x, or {SHARE:.0%} of a lower limit.")
@click.option("--json", "json_path", type=FILE, help="Write results and surroundings here.")
def main(
    model: str,
    batches: tuple[int, ...],
    names: tuple[str, ...],
    counts: tuple[int, ...] | None,
    size: int,
    seconds: float,
    check: bool,
    json_path: Path | None,
) -> None:
    """Time the fused net with 1, 2, ... threads, interleaved, beside the roofline's limit."""
    if ops.extension_error is not None:
        raise click.ClickException(f"there is nothing of ours to time: {ops.extension_error}")
    out, about = console(), machine()
    counts = counts or tuple(range(1, max(about.threads, 1) + 1))
    results: list[Scaling] = []
    with progress_bar(out) as progress:
        task = progress.add_task("", total=None)
        for name in names:
            net, images = plain_net(model).to(DTYPES[name]), random_images(max(batches), size=size)
            for batch in batches:

                def on_round(done: int, total: int) -> None:
                    text = f"{name}, batch {batch}"  # noqa: B023  (called within this round)
                    progress.update(task, description=text, completed=done, total=total)

                x = images[:batch].to(DTYPES[name])
                results += measure(net, DTYPES[name], x, counts, seconds, on_round)
    out.print(_table(f"{model}, {size}x{size}: fused, by threads", results))
    out.print(f"[dim]{about.describe()}[/dim]", highlight=False, soft_wrap=True)
    if json_path:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        content = {"when": now(), "machine": about.record(), "net": {"model": model, "size": size}}
        content |= {"goal": GOAL, "share": SHARE, "results": [r.record() for r in results]}
        json_path.write_text(json.dumps(content, indent=2) + "\n")
    judged = [r for r in results if r.enough is not None]
    if check and not (judged and all(r.enough for r in judged)):
        few = ", ".join(f"{dtype_name(r.dtype)} {r.speed_up:.2f}x" for r in judged if not r.enough)
        raise click.ClickException(f"two threads gain too little: {few or 'nothing was judged'}")


if __name__ == "__main__":
    main()
