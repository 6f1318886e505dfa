"""How fast is each convolution, against the machine's peak and PyTorch's prepacked oneDNN?

python -m benchmarks.bench_layers            every distinct layer of ResNet-18 and ResNet-50
python -m benchmarks.bench_layers --check    ResNet-18 in float32 against its targets
python -m benchmarks.bench_layers --in-net   where the time of whole nets goes
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console

from resnet_fused import models, ops, select
from resnet_fused.check import dtype_name
from resnet_fused.commands import picture
from resnet_fused.commands.options import DTYPES, FILE, SECONDS, BatchSizes
from resnet_fused.measure.machine import Machine
from resnet_fused.measure.peak import multiply_peak, read_bandwidth

from .arguments import Words
from .common import console, machine, plain_net, progress_bar, random_images
from .in_net import profile
from .layer_cases import COLD, WARM, Measured, l3_bytes, measure
from .layer_chart import save_roofline
from .layer_check import Verdict, judge, target
from .layer_tables import LEGEND, below_table, layer_table, net_table
from .layers import layers_of
from .when import now

_ops = torch.ops.resnet_fused


class Regex(click.ParamType):
    """A regular expression, compiled."""

    name = "regex"

    def convert(self, value, param, ctx) -> re.Pattern[str]:
        try:
            return re.compile(value)
        except re.error as error:
            self.fail(f"must be a regular expression, got {value!r}: {error}", param, ctx)


class Reason(click.ParamType):
    """ "REGEX=TEXT" -> (REGEX compiled, TEXT)."""

    name = "regex=text"

    def convert(self, value, param, ctx) -> tuple[re.Pattern[str], str]:
        if isinstance(value, tuple):
            return value
        expression, separator, text = value.partition("=")
        if not separator or not text:
            self.fail(f"must be REGEX=TEXT, got {value!r}", param, ctx)
        return Regex().convert(expression, param, ctx), text


@dataclass(frozen=True)
class Sweep:
    """What is measured: every combination."""

    nets: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    batches: tuple[int, ...]
    size: int

    def __iter__(self) -> Iterator[tuple[str, torch.dtype, int]]:
        return itertools.product(self.nets, self.dtypes, self.batches)


@dataclass(frozen=True)
class Group:
    """All layers of one net at one dtype and batch size."""

    net: str
    measured: list[Measured]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--net", "nets", type=Words(models.BUILDERS), help="[default: resnet18,resnet50]")
@click.option("--batches", type=BatchSizes(), help="[default: 1,8,32]")
@click.option("--dtypes", type=Words(DTYPES), help="[default: float32,bfloat16]")
@click.option("--size", type=click.IntRange(min=32), default=224, help="Height and width.")
@click.option("--only", type=Regex(), default="", help="Layers whose text or name it finds.")
@click.option("--plan", type=click.Choice(select.FORCES), default="none", help="Force a plan.")
@click.option("--isa", help="Force an instruction set [default: the widest].")
@click.option("--cold", is_flag=True, help="Weights from memory: copies beyond L3 take turns.")
@click.option("--seconds", type=SECONDS, default=1.0, help="Timed, per layer.")
@click.option("--rounds", type=click.IntRange(min=1), help="Interleaved rounds, not --seconds.")
@click.option("--check", is_flag=True, help="ResNet-18, float32, batch 1 and 8, against targets.")
@click.option("--reason", "reasons", type=Reason(), multiple=True, help="Why layers are below.")
@click.option("--in-net", is_flag=True, help="Time the steps of whole nets instead.")
@click.option("--json", "json_path", type=FILE, help="Write results and surroundings here.")
@click.option("--chart", type=FILE, help="Write a roofline chart (PNG) here.")
def main(
    nets: tuple[str, ...] | None,
    batches: tuple[int, ...] | None,
    dtypes: tuple[str, ...] | None,
    size: int,
    only: re.Pattern[str],
    plan: str,
    isa: str | None,
    cold: bool,
    seconds: float,
    rounds: int | None,
    check: bool,
    reasons: tuple[tuple[re.Pattern[str], str], ...],
    in_net: bool,
    json_path: Path | None,
    chart: Path | None,
) -> None:
    """Time every distinct convolution of a net: ours, oneDNN's and the machine's peak, interleaved.

    With --check: direct kernels must reach 85% of the multiply peak, Winograd kernels up to stage 3
    65% of it for the multiplications that they make; 4 layers may fall below, each with a reason,
    else the exit status is 1. It covers whatever is measured.
    """
    if ops.extension_error is not None:
        raise click.ClickException(f"there is nothing of ours to time: {ops.extension_error}")
    if chart:
        picture.require()
    sweep = Sweep(
        nets or (("resnet18",) if check else ("resnet18", "resnet50")),
        tuple(
            DTYPES[name] for name in dtypes or (("float32",) if check else ("float32", "bfloat16"))
        ),
        batches or ((1, 8) if check else (1, 8, 32)),
        size,
    )
    out = console()
    with _instruction_set(isa), select.forced(plan):
        about = machine()
        if in_net:
            _save(json_path, about, {"steps": _profile(out, sweep)})
            return
        groups = _measure(out, sweep, only, COLD if cold else WARM, seconds, rounds)
        measured = [m for group in groups for m in group.measured]
        verdict = judge(measured, reasons)
        out.print(f"[dim]{LEGEND}\n{about.describe()}[/dim]", highlight=False)
        _save(json_path, about, _results(groups, verdict))
        if chart:
            chart.parent.mkdir(parents=True, exist_ok=True)
            bandwidth = read_bandwidth(4 * l3_bytes())
            title = "Layers of " + " and ".join(dict.fromkeys(group.net for group in groups))
            save_roofline(chart, title, measured, bandwidth, about.describe())
    if check:
        _report(out, verdict)


def _measure(
    out: Console,
    sweep: Sweep,
    only: re.Pattern[str],
    weights: str,
    seconds: float,
    rounds: int | None,
) -> list[Group]:
    """Measures group by group and prints each one's table when it is done."""
    groups = []
    for net, dtype, batch in sweep:
        layers = [
            layer
            for layer in layers_of(net, sweep.size)
            if only.search(f"{layer.text} {layer.name}")
        ]
        measured = []
        with progress_bar(out) as progress:
            task = progress.add_task("", total=len(layers))
            for layer in layers:
                text = f"{net} {dtype_name(dtype)} batch {batch}: {layer.text}"
                progress.update(task, description=text)
                measured.append(
                    measure(layer, batch, dtype, weights=weights, seconds=seconds, rounds=rounds)
                )
                progress.advance(task)
        if measured:
            out.print(layer_table(net, measured))
            groups.append(Group(net, measured))
    if not groups:
        raise click.ClickException(f"--only: no layer matches {only.pattern!r}")
    return groups


def _profile(out: Console, sweep: Sweep) -> list[dict[str, object]]:
    """Prints a table a net, dtype and batch size; returns their rows for JSON."""
    records = []
    for net, dtype, batch in sweep:
        model = plain_net(net).to(dtype)
        parts = profile(model, random_images(batch, size=sweep.size).to(dtype))
        title = f"{net}, {dtype_name(dtype)}, batch {batch}: steps within the net"
        out.print(net_table(title, parts, multiply_peak(seconds=0.2)))
        case = {"net": net, "dtype": dtype_name(dtype), "batch": batch}
        records += [case | part.record() for part in parts]
    return records


def _report(out: Console, verdict: Verdict) -> None:
    if verdict.below:
        out.print(below_table(verdict))
    if verdict.failures:
        raise click.ClickException("; ".join(verdict.failures))
    out.print(f"[green]{verdict.held} measurements, {len(verdict.layers)} layers below.[/green]")


def _results(groups: list[Group], verdict: Verdict) -> dict[str, object]:
    """Every measurement for JSON, with its target and the reasons for falling short."""
    reasons = {id(below.measured): below.reasons for below in verdict.below}
    return {
        "layers_below": len(verdict.layers),
        "failures": verdict.failures,
        "results": [
            {"net": group.net}
            | m.record()
            | {"target": target(m), "reasons": reasons.get(id(m), ())}
            for group in groups
            for m in group.measured
        ],
    }


def _save(path: Path | None, about: Machine, content: dict[str, object]) -> None:
    """What --json writes; times in milliseconds."""
    if path is None:
        return
    document = {"when": now(), "machine": about.record(), "forced": select.force()} | content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


@contextmanager
def _instruction_set(isa: str | None) -> Iterator[None]:
    """The kernels of `isa` within the block; None leaves the choice alone."""
    if isa is None:
        yield
        return
    try:
        _ops.set_cpu_isa(isa)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    try:
        yield
    finally:
        _ops.set_cpu_isa("")


if __name__ == "__main__":
    main()
