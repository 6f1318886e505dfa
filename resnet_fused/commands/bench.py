"""`resnet-fused bench`: the fused net beside what a user would run instead, wins and losses."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import click
import torch
from rich.console import Console

from .. import models, select, tuned
from ..measure.compare import Result, WrongResult, best_peer, compare, of_engine, ratio
from ..measure.engines import FUSED, engines
from ..measure.error import exact_logits
from ..measure.machine import Machine, machine
from ..measure.networks import plain_net, random_images
from . import picture
from .console import console, progress_bar
from .options import DTYPES, FILE, SECONDS, BatchSizes
from .tables import add_results, speed_table, verdict
from .threads import torch_threads


@click.command()
@click.option("--model", type=click.Choice(list(models.BUILDERS)), default="resnet18")
@click.option("--batch", "batches", type=BatchSizes(), default="1,8,32", help="Batch sizes.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32")
@click.option("--size", type=click.IntRange(min=32), default=224, help="Height and width.")
@click.option("--threads", type=click.IntRange(min=1), help="torch's threads [default: as is].")
@click.option("--seconds", type=SECONDS, default=20.0, help="Timed, per batch size.")
@click.option("--rounds", type=click.IntRange(min=1), help="Interleaved rounds, not --seconds.")
@click.option("--ours", is_flag=True, help="Also the fused net with own kernels forced.")
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out.")
@click.option("--json", "json_path", type=FILE, help="Write results and surroundings here.")
@click.option("--chart", type=FILE, help="Write a bar chart (PNG) here.")
def bench(
    model: str,
    batches: tuple[int, ...],
    dtype: str,
    size: int,
    threads: int | None,
    seconds: float,
    rounds: int | None,
    ours: bool,
    no_compile: bool,
    json_path: Path | None,
    chart: Path | None,
) -> None:
    """Time eager, eager channels_last, torch.compile with freezing and fused, interleaved.

    Ratios are to the fastest of the first three. Errors are relative L2 of the logits against fp64.
    """
    if chart:
        picture.require()
    for path in filter(None, (json_path, chart)):
        path.parent.mkdir(parents=True, exist_ok=True)
    out = console()
    chosen = engines(compile=not no_compile, ours=ours)
    with torch_threads(threads):
        about, answers = machine(), tuned.answers()
        groups = _measure(out, model, batches, DTYPES[dtype], size, chosen, seconds, rounds)
    title = f"{model}, {dtype}, {size}x{size}, threads: {about.threads}"
    if select.force() != "none":
        title += f", selection forced to {select.force()}"
    elif answers:
        title += ", selection tuned"
    table = speed_table(title, "to best peer")
    for group in groups:
        add_results(table, group, best_peer(group))
    out.print(table)
    for group in groups:
        out.print(_verdict(group), highlight=False)
    out.print(f"[dim]{about.describe()}[/dim]", highlight=False, soft_wrap=True)
    if json_path:
        net = {"model": model, "dtype": dtype, "size": size}
        json_path.write_text(json.dumps(_document(about, net, groups), indent=2) + "\n")
    if chart:
        panels = [picture.Panel(f"batch {g[0].batch}", g, best_peer(g)) for g in groups]
        footer = f"{about.describe()}. Ratios are to the fastest grey bar."
        picture.save_speed(chart, title, panels, footer)


def _measure(
    out: Console,
    model: str,
    batches: tuple[int, ...],
    dtype: torch.dtype,
    size: int,
    chosen: dict,
    seconds: float,
    rounds: int | None,
) -> list[list[Result]]:
    """One list of results a batch size."""
    net = plain_net(model).to(dtype)
    images = random_images(max(batches), size=size).to(dtype)
    groups = []
    with progress_bar(out) as progress:
        task = progress.add_task("fp64, to compare with", total=None)

        def on_stage(text: str, done: int, total: int) -> None:
            progress.update(task, description=f"batch {batch}: {text}", completed=done, total=total)

        exact = exact_logits(net, images)
        for batch in batches:
            x, y = images[:batch].clone(), exact[:batch]
            try:
                results = compare(
                    net, x, y, chosen, budget_s=seconds, rounds=rounds, on_stage=on_stage
                )
            except WrongResult as wrong:
                raise click.ClickException(f"batch {batch}: {wrong}.") from wrong
            groups.append(results)
    return groups


def _verdict(group: list[Result]) -> str:
    """Whether fused is the fastest of a batch size, and by how much."""
    fused, peer = of_engine(group, FUSED), best_peer(group)
    where = f"batch {fused.batch}"
    return f"{where}: no peer could run" if peer is None else verdict(where, fused, peer)


def _document(about: Machine, net: dict, groups: list[list[Result]]) -> dict[str, object]:
    """What --json writes; times in milliseconds per call."""
    return {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": about.record(),
        "net": net,
        "results": [
            result.record() | {"ratio_to_best_peer": ratio(result, best_peer(group))}
            for group in groups
            for result in group
        ],
    }
