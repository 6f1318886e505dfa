"""The demo's speed part: the trained net and one of ImageNet's size, in every engine."""

from __future__ import annotations

from dataclasses import dataclass

import click
from rich.console import Console
from torch import Tensor, nn

import resnet_fused as rf

from ..measure.compare import Result, WrongResult, compare, of_engine, ratio
from ..measure.engines import CHANNELS_LAST, FUSED, OURS, engines
from ..measure.error import exact_logits
from ..measure.networks import plain_net, random_images
from .console import progress_bar
from .digits import SIZE as DIGITS_SIZE
from .picture import Panel
from .tables import add_results, backend_table, speed_table


@dataclass(frozen=True)
class Scale:
    """How much is measured. `judged`: whether being slower is a failure."""

    size: int  # height and width of the large net's images
    budget_s: float  # timed seconds for each net and batch
    warmup_s: float  # untimed seconds for each engine before them
    judged: bool


FULL = Scale(size=224, budget_s=10.0, warmup_s=0.3, judged=True)
QUICK = Scale(size=32, budget_s=0.1, warmup_s=0.02, judged=False)


@dataclass(frozen=True)
class Case:
    """A net and a batch of images to time it with."""

    name: str
    net: nn.Module
    x: Tensor
    judged: bool

    def __str__(self) -> str:
        return f"{self.name}, batch {len(self.x)}"


def show(
    out: Console, digits_net: nn.Module, seed: int, scale: Scale, *, compile: bool
) -> tuple[list[Panel], list[str]]:
    """Times all cases and prints tables; returns the picture's panels and what is too slow."""
    large = plain_net("resnet18", seed=seed)
    images = random_images(8, size=scale.size, seed=seed)
    name = f"1000 classes, {scale.size}x{scale.size}"
    small = f"digits, {DIGITS_SIZE}x{DIGITS_SIZE}"
    cases = [
        Case(small, digits_net, random_images(1, 1, DIGITS_SIZE, seed), judged=False),
        Case(name, large, images[:1], scale.judged),
        Case(name, large, images, scale.judged),
    ]
    table = speed_table("ResNet-18 in fp32, medians of interleaved runs", "to channels_last")
    panels, failures = [], []
    for case in cases:
        results = _measure(out, case, scale, compile)
        failures += too_slow(results) if case.judged else []
        table.add_row("", f"[bold]{case.name}[/bold]")
        add_results(table, results, of_engine(results, CHANNELS_LAST))
        panels.append(Panel(str(case), results, of_engine(results, CHANNELS_LAST)))
    out.print(table)
    out.print(
        "[dim]error: relative L2 of the logits against fp64, checked before anything was timed.\n"
        f"{OURS}: fused with every convolution forced onto this package's own kernels.[/dim]"
    )
    _print_backends(out, large, images[:1])
    return panels, failures


def too_slow(results: list[Result]) -> list[str]:
    """One sentence for each loss that may not be: the selection's, and at batch 1 own kernels'."""
    standard = of_engine(results, CHANNELS_LAST)
    if standard is None:
        return [f"{CHANNELS_LAST} could not be timed."]
    failures = []
    for engine in (FUSED, OURS) if standard.batch == 1 else (FUSED,):
        times = ratio(of_engine(results, engine), standard)
        if times <= 1:
            failures.append(
                f"{engine!r} must be faster than {CHANNELS_LAST!r} at batch {standard.batch}, "
                f"got {times:.2f}x: see whether `resnet-fused doctor` finds the reason."
            )
    return failures


def _measure(out: Console, case: Case, scale: Scale, compile: bool) -> list[Result]:
    """The case's results; where a judged one is too slow, those of a second, longer look."""
    with progress_bar(out) as progress:
        task = progress.add_task(f"{case}: fp64", total=None)

        def on_stage(text: str, done: int, total: int) -> None:
            progress.update(task, description=f"{case}: {text}", completed=done, total=total)

        def look(budget_s: float) -> list[Result]:
            return compare(
                case.net,
                case.x,
                exact,
                engines(compile=compile, ours=True),
                budget_s=budget_s,
                warmup_s=scale.warmup_s,
                on_stage=on_stage,
            )

        exact = exact_logits(case.net, case.x)
        try:
            results = look(scale.budget_s)
            if case.judged and too_slow(results):  # perhaps others kept the machine busy
                results = look(3 * scale.budget_s)
        except WrongResult as wrong:
            raise click.ClickException(f"{case}: {wrong}.") from wrong
    return results


def _print_backends(out: Console, net: nn.Module, x: Tensor) -> None:
    """Who computes which layer, with selection on and with own kernels forced."""
    fused = rf.fuse(net)
    reports = {FUSED: rf.report(fused, x)}
    with rf.select.forced("ours"):
        reports[OURS] = rf.report(fused, x)
    out.print(f"\n[bold]Who computes which layer at {x.shape[-1]}x{x.shape[-1]}, batch 1[/bold]")
    out.print(backend_table(reports))
