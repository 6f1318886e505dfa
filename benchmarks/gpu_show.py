"""A record of bench_gpu for the eye: tables of nets and layers, verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resnet_fused.commands.console import coloured_ratio, milliseconds
from resnet_fused.measure.engines import OWN

from .common import Result, best_peer, ratio, titled_table, verdict
from .gpu_layers import OURS
from .record import Record, results_of
from .show import by_net

LEGEND = (
    "floor: each convolution with its epilogue at the speed of a matrix product or a copy measured "
    "in this run. to best peer: how many times as fast as the fastest engine that is not ours."
)
LAYER_LEGEND = (
    "n: how many the net has. of matmul: of a large matrix product's speed. to PyTorch: to its "
    "convolution with folded bias, then addition and ReLU in place; to cuDNN: to its fused op."
)


def tables(out: Console, record: Record) -> None:
    """Nets, their layers, who won, what failed, what it was measured on."""
    if record["setup"]["dry_run"]:
        out.print("dry run: tiny nets on the CPU, nothing is timed", style="yellow")
    size = record["setup"]["size"]
    for (model, dtype), entries in by_net(record).items():
        out.print(net_table(f"{model}, {dtype}, {size}x{size}", entries))
        for entry in entries:
            if entry["layers"]:
                title = f"{model}, {dtype}, batch {entry['batch']}: layers"
                out.print(layer_table(title, entry))
    for line in verdicts(record):
        out.print(line, highlight=False)
    for line in failures(record):
        out.print(f"[red]{escape(line)}[/red]", highlight=False)
    out.print(f"[dim]{LEGEND}[/dim]\n[dim]{LAYER_LEGEND}[/dim]", highlight=False)
    out.print(f"[dim]{escape(surroundings(record))}[/dim]", highlight=False)


def net_table(title: str, entries: list[Mapping[str, Any]]) -> Table:
    """A section a batch size, a row an engine."""
    table = titled_table(title)
    table.add_column("batch", justify="right")
    table.add_column("engine", no_wrap=True)
    for heading in ("ms", "quartiles", "images/s", "to best peer", "of floor", "error"):
        table.add_column(heading, justify="right")
    for entry in entries:
        results = results_of(entry)
        peer = best_peer(results)
        selection = entry["selection"]
        if selection["force"] != "none" or selection["tuned"]:
            table.caption = f"ours: plan in force {selection['force']}, {selection['tuned']} tuned"
        for r in results:
            table.add_row(str(entry["batch"]), r.engine, *_cells(r, peer, entry["floor_ms"]))
        table.add_section()
    return table


def _cells(r: Result, peer: Result | None, floor_ms: float | None) -> list[str]:
    error = "-" if r.error is None else f"{r.error:.1e}"
    if r.samples is None:
        return ["-", f"[dim]{escape(r.reason)}[/dim]", "-", "-", "-", error]
    q1, q3 = r.samples.quartiles
    times = ratio(r, peer)
    return [
        milliseconds(r.samples.median),
        f"{milliseconds(q1)}-{milliseconds(q3)}",
        f"{r.images_per_second:.0f}",
        "-" if times is None else coloured_ratio(times),
        "-" if floor_ms is None else f"{1e-3 * floor_ms / r.samples.median:.0%}",
        error,
    ]


def layer_table(title: str, entry: Mapping[str, Any]) -> Table:
    """A section a stage, a row a distinct layer."""
    table = titled_table(title)
    table.add_column("layer", no_wrap=True)
    table.add_column("n", justify="right")
    table.add_column("plan", no_wrap=True)
    for heading in ("us", "TFLOP/s", "of matmul", "to PyTorch", "to cuDNN", "error"):
        table.add_column(heading, justify="right")
    stage = None
    for row in entry["layers"]:
        if stage not in (None, row["stage"]):
            table.add_section()
        stage = row["stage"]
        table.add_row(
            row["layer"],
            str(row["count"]),
            row["plan"],
            f"{row['us'][OURS]:.1f}" if OURS in row["us"] else "-",
            f"{row['tflops']:.0f}" if "tflops" in row else "-",
            f"{row['share_of_matmul']:.0%}" if "tflops" in row else "-",
            _ratio(row.get("ratio_to_pytorch")),
            _ratio(row.get("ratio_to_cudnn")),
            f"{row['errors'][OURS]:.1e}",
        )
    return table


def verdicts(record: Record) -> list[str]:
    """For each case that was timed, how our fastest stands to the fastest peer, losses too."""
    lines = []
    for name, entry in record["cases"].items():
        results = results_of(entry)
        own = [r for r in results if r.engine in OWN and r.samples]
        peer = best_peer(results)
        if not own or peer is None:
            continue
        lines.append(verdict(name, min(own, key=lambda r: r.samples.median), peer))
    return lines


def failures(record: Record) -> list[str]:
    """Where ours failed: whole cases, then layers of others."""
    lines = [f"{name}: failed: {why}" for name, why in record["failed"].items()]
    for name, entry in record["cases"].items():
        lines += [f"{name}: failed: {why}" for why in entry["failures"]]
        lines += [
            f"{name}: {r.engine} failed: {r.reason}"
            for r in results_of(entry)
            if r.engine in OWN and r.error is None
        ]
    return lines


def surroundings(record: Record) -> str:
    """One line: GPU, driver, versions, commit."""
    about, versions = record["machine"], record["versions"]
    gpu = "no GPU" if record["setup"]["dry_run"] else f"{about['gpu']}, driver {about['driver']}"
    known = ", ".join(f"{name} {text}" for name, text in versions.items() if text)
    return f"{gpu}, {known}, resnet-fused {about['package']}, commit {about['commit'] or 'unknown'}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else coloured_ratio(value)
