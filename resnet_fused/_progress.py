"""The progress bar of everything that takes long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(out: Console) -> Iterator[Progress]:
    """A bar with description, count and elapsed time; it leaves no trace when done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Without a terminal a bar would only leave an empty line.
    seen = out.is_terminal or out.is_jupyter
    with Progress(*columns, console=out, transient=True, disable=not seen) as progress:
        yield progress
