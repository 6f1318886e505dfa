"""A record of bench_engines for the eye: tables, verdicts, bar charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from resnet_fused.commands import picture

from .common import FUSED, add_results, best_peer, speed_table, titled_table
from .goals import Outcome, Verdict
from .peers import BY_TITLE
from .record import Record, results_of

LOOKS = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.INCOMPLETE: "yellow"}


def tables(out: Console, record: Record) -> None:
    """A table for each net and precision, then errors over seeds, then what it was measured on."""
    for (model, dtype), entries in by_net(record).items():
        title = f"{model}, {dtype}, {record['setup']['size']}x{record['setup']['size']}"
        table = speed_table(f"{title}, threads: {record['setup']['threads']}", "to best peer")
        for entry in entries:
            results = results_of(entry)
            add_results(table, results, best_peer(results))
        out.print(table)
    if record["accuracy"]:
        out.print(accuracy_table(record["accuracy"]))
    out.print(f"[dim]{surroundings(record)}[/dim]", highlight=False)


def by_net(record: Record) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """(model, dtype) -> its cases by growing batch, in the order in which they were measured."""
    nets: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in record["cases"].values():
        nets.setdefault((entry["model"], entry["dtype"]), []).append(entry)
    return {net: sorted(entries, key=lambda e: e["batch"]) for net, entries in nets.items()}


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = titled_table("Error of the logits against float64")
    for heading in ("net", "precision", "seeds", "fused", "eager", "allowed", ""):
        table.add_column(heading, justify="left" if heading in ("net", "precision") else "right")
    for row in rows:
        errors = (f"{row[key]:.2e}" for key in ("error", "eager_error", "limit"))
        outcome = Outcome.PASS if row["ok"] else Outcome.FAIL
        table.add_row(
            row["model"], row["precision"], str(row["seeds"]), *errors, _coloured(outcome)
        )
    return table


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    table = titled_table("Goals: time of the fastest peer / time of the fused net")
    for heading in ("case", "over", "fastest"):
        table.add_column(heading)
    for heading in ("ratio", "at least", "aim"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for v in verdicts:
        everybody = len(v.goal.over) == len(BY_TITLE) - 1
        table.add_row(
            str(v.goal.case),
            "all" if everybody else ", ".join(v.goal.over),
            v.peer or "-",
            "-" if v.ratio is None else f"{v.ratio:.2f}",
            f"{v.goal.at_least:g}",
            f"{v.goal.aim:g}",
            _coloured(v.outcome) + (f", {v.remark}" if v.remark else ""),
        )
    return table


def conclusion(out: Console, outcome: Outcome) -> None:
    text = {
        Outcome.PASS: "every goal is reached",
        Outcome.FAIL: "a goal is missed",
        Outcome.INCOMPLETE: "no goal is missed, but not all could be measured in full",
    }[outcome]
    out.print(f"[{LOOKS[outcome]}]{text}[/]", highlight=False)


def chart(path: Path, record: Record, about: str, columns: int) -> None:
    """One panel a case, ratios to the fastest peer. about: what it was measured on."""
    panels = []
    for (model, dtype), entries in by_net(record).items():
        for entry in entries:
            results = results_of(entry)
            heading = f"{model}, {dtype}, batch {entry['batch']}"
            panels.append(picture.Panel(heading, results, best_peer(results)))
    footer = f"{about}. Ratios are to the fastest grey bar."
    picture.save_speed(path, "The fused net beside other engines", panels, footer, columns=columns)


def surroundings(record: Record) -> str:
    """One line: processor, threads, versions."""
    about = record["machine"]
    versions = ", ".join(
        f"{entrant.packages[0]} {record['versions'][entrant.packages[0]]}"
        for entrant in BY_TITLE.values()
        if entrant.title not in (FUSED, "torch.compile")
        and record["versions"].get(entrant.packages[0])
    )
    return (
        f"{about['cpu']}, {about['cpus']} processors, threads: {record['setup']['threads']}, "
        f"kernels {about['isa_in_use'] or 'not in use'}, "
        f"resnet-fused {about['package']}, {versions}"
    )


def _coloured(outcome: Outcome) -> str:
    return f"[{LOOKS[outcome]}]{outcome.value}[/]"
