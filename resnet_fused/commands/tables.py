"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from ..measure.compare import Result, ratio
from .console import coloured_ratio, milliseconds


def speed_table(title: str, ratio_heading: str) -> Table:
    """An empty table of results; fill it with `add_results`."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    table.add_column("batch", justify="right")
    table.add_column("engine")
    for heading in ("ms", "quartiles", "images/s", ratio_heading, "error"):
        table.add_column(heading, justify="right")
    return table


def add_results(table: Table, results: Sequence[Result], standard: Result | None) -> None:
    """One section: a row an engine, the ratio to `standard` green for a gain and red for a loss."""
    for r in results:
        if r.samples is None:
            table.add_row(
                str(r.batch), r.engine, "-", f"[dim]{escape(r.reason)}[/dim]", "-", "-", "-"
            )
            continue
        q1, q3 = r.samples.quartiles
        times = ratio(r, standard)
        table.add_row(
            str(r.batch),
            r.engine,
            milliseconds(r.samples.median),
            f"{milliseconds(q1)}-{milliseconds(q3)}",
            f"{r.images_per_second:.1f}",
            "-" if times is None else coloured_ratio(times),
            f"{r.error:.1e}",
        )
    table.add_section()
