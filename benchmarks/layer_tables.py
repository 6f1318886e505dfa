"""The tables of bench_layers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.markup import escape
from rich.table import Table

from resnet_fused.check import dtype_name
from resnet_fused.commands.console import coloured_ratio, milliseconds

from .common import titled_table
from .in_net import Part
from .layer_cases import Measured
from .layer_check import Verdict, target

LEGEND = (
    "n: how many the net has. GFLOP/s: of the direct convolution. share: multiplications that the "
    "plan makes, of the peak. limit: the share that reading its operands once and one call leave. "
    "ratio: how many times as fast as PyTorch's prepacked oneDNN convolution. error: ours and "
    "oneDNN's, relative L2 against fp64."
)


def layer_table(net: str, measured: Sequence[Measured]) -> Table:
    """One net at one batch size and dtype, a row a layer, a section a stage.

    A share below its target is red.
    """
    table = titled_table(_title(net, measured))
    table.add_column("layer", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("plan", no_wrap=True)
    for text in ("ms", "GFLOP/s", "share", "limit", "ratio", "error", "oneDNN"):
        table.add_column(text, justify="right", no_wrap=True)
    for before, m in zip([*measured[:1], *measured], measured, strict=False):
        if m.layer.stage != before.layer.stage:
            table.add_section()
        table.add_row(
            m.layer.text,
            str(m.layer.count),
            m.plan,
            milliseconds(m.seconds),
            f"{m.gflops:.0f}",
            _share(m),
            f"{m.limit:.0%}",
            "-" if m.ratio is None else coloured_ratio(m.ratio),
            f"{m.error:.1e}",
            "-" if m.peer_error is None else f"{m.peer_error:.1e}",
        )
    return table


def below_table(verdict: Verdict) -> Table:
    """The layers below their target and why."""
    table = titled_table(f"Below their target: {len(verdict.layers)} layers")
    for text in ("layer", "plan", "batch", "share", "target"):
        table.add_column(
            text, no_wrap=True, justify="left" if text in ("layer", "plan") else "right"
        )
    table.add_column("reason", overflow="fold")
    for below in verdict.below:
        m = below.measured
        table.add_row(
            m.layer.text,
            m.plan,
            str(m.batch),
            f"{m.share:.0%}",
            f"{below.target:.0%}",
            escape("; ".join(below.reasons)) or "[red]not known[/red]",
        )
    return table


def net_table(title: str, parts: Sequence[Part], peak: float) -> Table:
    """Milliseconds of each step inside the net; peak: multiply-adds a second."""
    table = titled_table(title)
    for text in ("step", "module", "backend"):
        table.add_column(text)
    for text in ("ms", "of the net", "GFLOP/s", "of peak"):
        table.add_column(text, justify="right")
    total = sum(part.seconds for part in parts)
    for part in parts:
        speed = part.multiplications / part.seconds
        table.add_row(
            part.name,
            part.kind,
            escape(part.backend),
            milliseconds(part.seconds),
            f"{part.seconds / total:.0%}",
            f"{2e-9 * speed:.0f}" if speed else "",
            f"{speed / peak:.0%}" if speed else "",
        )
    table.add_section()
    table.add_row("", "whole net", "", milliseconds(total), "100%", "", "")
    return table


def _title(net: str, measured: Sequence[Measured]) -> str:
    first = measured[0]
    peak = median(m.peak for m in measured)
    ours = sum(m.seconds * m.layer.count for m in measured)
    text = (
        f"{net}, {dtype_name(first.dtype)}, batch {first.batch}, {first.weights} weights, "
        f"peak {2e-9 * peak:.0f} GFLOP/s: together {milliseconds(ours)} ms"
    )
    if all(m.peer_seconds is not None for m in measured):
        peer = sum(m.peer_seconds * m.layer.count for m in measured)
        text += f", oneDNN {milliseconds(peer)} ms"
    return text


def _share(m: Measured) -> str:
    wanted = target(m)
    text = f"{m.share:.0%}"
    return f"[red]{text}[/red]" if wanted is not None and m.share < wanted else text
