"""The README's table of speed from records of bench_engines: python -m benchmarks.readme FILE...

Prints it; with --write it replaces what stands between the two markers in the file given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from .common import FUSED, Result, best_peer, milliseconds, of_engine, ratio
from .peers import ENTRANTS
from .record import Record, read, results_of
from .show import by_net, surroundings

BEGIN = "<!-- engines: written by python -m benchmarks.readme -->"
END = "<!-- /engines -->"
PATH = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("records", type=PATH, nargs=-1, required=True)
@click.option("--write", type=PATH, help="Put it between the markers of this file.")
def main(records: tuple[Path, ...], write: Path | None) -> None:
    """Print the table of these records in Markdown."""
    try:
        text = markdown([read(path) for path in records])
        if write:
            write.write_text(replace(write.read_text(), text))
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if not write:
        click.echo(text)


def markdown(records: Sequence[Record]) -> str:
    """One row a case, a column an engine, the fastest of a row in bold, losses as they are."""
    titles = [e.title for e in ENTRANTS if any(e.title in _timed(r) for r in records)]
    lines = [
        "| | batch | " + " | ".join(titles) + " | best peer / fused |",
        "|---" * (len(titles) + 3) + "|",
    ]
    for record in records:
        for (model, dtype), entries in by_net(record).items():
            name = f"{model.replace('resnet', 'ResNet-')} {dtype}"
            for entry in entries:
                lines.append(_row(name, titles, results_of(entry)))
                name = ""
    footers = dict.fromkeys(f"{surroundings(record)}." for record in records)
    return "\n".join([*lines, "", *footers])


def replace(document: str, text: str) -> str:
    """document with text between its markers; raises ValueError where they are missing."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the file must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def _row(name: str, titles: Sequence[str], results: list[Result]) -> str:
    fastest = min((r.samples.median for r in results if r.samples), default=None)
    cells = []
    for title in titles:
        result = of_engine(results, title)
        text = "-" if result is None else milliseconds(result.samples.median)
        cells.append(f"**{text}**" if result and result.samples.median == fastest else text)
    fused = of_engine(results, FUSED)
    times = None if fused is None else ratio(fused, best_peer(results))
    batch = str(results[0].batch)
    return "| " + " | ".join([name, batch, *cells, "-" if times is None else f"{times:.2f}"]) + " |"


def _timed(record: Record) -> set[str]:
    """Engines that have a time in any case."""
    rows = (row for entry in record["cases"].values() for row in entry["results"])
    return {row["engine"] for row in rows if "median_ms" in row}


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.readme")
