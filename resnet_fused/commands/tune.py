"""`resnet-fused tune`: measures the kernels of a net's convolutions here and keeps the answer."""

from __future__ import annotations

import click
from rich.markup import escape
from rich.table import Table

import resnet_fused as rf

from .. import _environment, check, models, select
from .._errors import one_line
from ..measure.machine import machine
from ..measure.networks import plain_net, random_images
from ..tune import Tuning
from .console import console
from .options import DTYPES, SECONDS
from .tables import titled_table
from .threads import torch_threads

OPT_IN = [plan for plan, traits in check.PLAN_TRAITS.items() if traits.opt_in]


@click.command()
@click.option("--model", type=click.Choice(list(models.BUILDERS)), default="resnet18")
@click.option("--batch", type=click.IntRange(min=1), default=1, help="Images at a time.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32")
@click.option("--device", default="cpu", help="cpu, cuda or cuda:1.")
@click.option("--size", type=click.IntRange(min=32), default=224, help="Height and width.")
@click.option("--threads", type=click.IntRange(min=1), help="torch's threads [default: as is].")
@click.option("--seconds", type=SECONDS, default=1.0, help="Timed, per convolution.")
@click.option(
    "--allow",
    type=click.Choice(check.PLANS),
    multiple=True,
    help="Measure this plan, too, though its error is above the usual bound "
    f"({', '.join(OPT_IN) or 'none'}); may be repeated.",
)
def tune(
    model: str,
    batch: int,
    dtype: str,
    device: str,
    size: int,
    threads: int | None,
    seconds: float,
    allow: tuple[str, ...],
) -> None:
    """Measure every kernel for every convolution of a net on this machine and keep the answer.

    From then on every fused model takes the fastest for these convolutions. For a net of your own:
    resnet_fused.tune(fused, x).
    """
    out = console()
    try:
        fused = rf.fuse(plain_net(model).to(device, DTYPES[dtype]))
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch without it
        raise click.BadParameter(one_line(error, None), param_hint="--device") from None
    x = random_images(batch, size=size).to(device, DTYPES[dtype])
    with torch_threads(threads):
        about = machine()
        try:
            result = rf.tune(fused, x, allow=allow, seconds=seconds)
        except RuntimeError as wrong:
            raise click.ClickException(f"{wrong}.") from wrong
    title = f"{model}, {dtype}, {size}x{size}, threads: {about.threads}, milliseconds"
    known = f" {dtype} cpu" if device == "cpu" else f" {dtype} cuda batch {batch}"
    out.print(_table(title, result, known))
    out.print(escape(result.summary()), highlight=False, soft_wrap=True)
    if about.is_busy():
        text = f"{about.load:.1f} running processes in the last minute: tune again when idle"
        out.print(f"[yellow]{text}[/yellow]", highlight=False)
    if select.force() != "none":
        out.print(f"{_environment.FORCE} is set, so it decides and not what was measured.")
    out.print(f"[dim]{about.describe()}[/dim]", highlight=False, soft_wrap=True)


def _table(title: str, result: Tuning, known: str) -> Table:
    """The winner green; yellow where it is not the plan that the rule names. known: the end of a
    convolution's text that the title says already.
    """
    table = titled_table(title)
    headings, rows = result.table()
    for heading, justify in headings.items():
        table.add_column(heading, justify=justify)
    for shape, *cells, plan, by_rule in rows:
        colour = "green" if plan == by_rule else "yellow"
        table.add_row(shape.removesuffix(known), *cells, f"[{colour}]{plan}[/{colour}]", by_rule)
    return table
