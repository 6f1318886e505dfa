"""Results and reports as tables that fit the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from ..measure.compare import Result, ratio
from ..report import Report
from .console import coloured_ratio, milliseconds


def titled_table(title: str) -> Table:
    """Empty, its title bold above the first column."""
    return Table(title=title, title_justify="left", title_style="bold", header_style="bold")


def speed_table(title: str, ratio_heading: str) -> Table:
    """An empty table of results; fill it with `add_results`."""
    table = titled_table(title)
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


def verdict(where: str, ours: Result, peer: Result) -> str:
    """Whether ours is faster than the peer, and by how much, losses too. Both were timed."""
    times = ratio(ours, peer)
    if times >= 1:
        return f"[green]{where}: {ours.engine} is {times:.2f}x as fast as {peer.engine}[/green]"
    return f"[red]{where}: a loss, {peer.engine} is {1 / times:.2f}x as fast as {ours.engine}[/red]"


def swapped_table(report: Report) -> Table:
    """What `rf.report` tells, folded to the terminal's width."""
    table = Table(header_style="bold")
    for heading in ("name", "kind", "fused", "backend", "reason"):
        table.add_column(heading)
    table.add_column("packed", justify="right", no_wrap=True)
    for row in report:
        fused = "[green]yes[/green]" if row.fused else "[red]no[/red]"
        texts = (escape(text) for text in (row.backend, row.reason))
        table.add_row(row.name, row.kind, fused, *texts, f"{row.packed_bytes / 1e6:.2f} MB")
    return table


def backend_table(reports: Mapping[str, Report]) -> Table:
    """Who computes each layer of one net: a column for each of the named reports."""
    table = Table("name", "kind", *reports, header_style="bold")
    for rows in zip(*reports.values(), strict=True):
        table.add_row(rows[0].name, rows[0].kind, *(escape(row.backend) for row in rows))
    return table
