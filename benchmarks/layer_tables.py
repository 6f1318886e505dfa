"""The tables of bench_layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.markup import escape
from rich.table import Table

from resnet_fused.check import dtype_name
from resnet_fused.commands.console import coloured_ratio, milliseconds

from .in_net import Part
from .layer_cases import Measured


def layer_table(title: str) -> Table:
    """An empty table of layers; fill it with `add_layer`."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("", justify="right")
    table.add_column("layer", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("plan", no_wrap=True)
    for heading in ("ms", "GFLOP/s", "share", "limit", "x oneDNN", "error", "oneDNN"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def add_layer(table: Table, m: Measured) -> None:
    table.add_row(
        str(m.layer.stage),
        m.layer.text,
        str(m.layer.count),
        m.plan,
        milliseconds(m.seconds),
        f"{m.gflops:.0f}",
        f"{m.share:.0%}",
        f"{m.roofline:.0%}",
        "-" if m.ratio is None else coloured_ratio(m.ratio),
        f"{m.error:.1e}",
        "-" if m.peer_error is None else f"{m.peer_error:.1e}",
    )


def heading(net: str, batch: int, measured: Sequence[Measured]) -> str:
    """Title of one table: what was measured, and the sums over the whole net."""
    first = measured[0]
    ours = sum(m.seconds * m.layer.count for m in measured)
    text = (
        f"{net}, {dtype_name(first.dtype)}, batch {batch}, {first.weights} weights, "
        f"peak {2e-9 * first.peak:.0f} GFLOP/s: all convolutions {milliseconds(ours)} ms"
    )
    if all(m.peer_seconds is not None for m in measured):
        text += f", oneDNN {milliseconds(sum(m.peer_seconds * m.layer.count for m in measured))}"
    return text


def net_table(title: str, parts: Iterable[Part], peak: float) -> Table:
    """Milliseconds of each step inside the net; peak: multiply-adds a second."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("step")
    table.add_column("module")
    table.add_column("backend")
    for text in ("ms", "of the net", "GFLOP/s", "of peak"):
        table.add_column(text, justify="right")
    parts = list(parts)
    total = sum(part.seconds for part in parts)
    for part in parts:
        speed = 2e-9 * part.multiplications / part.seconds if part.multiplications else None
        table.add_row(
            part.name,
            part.kind,
            escape(part.backend),
            milliseconds(part.seconds),
            f"{part.seconds / total:.0%}",
            "" if speed is None else f"{speed:.0f}",
            "" if speed is None else f"{speed / (2e-9 * peak):.0%}",
        )
    table.add_section()
    table.add_row("", "whole net", "", milliseconds(total), "100%", "", "")
    return table
