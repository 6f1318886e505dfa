"""Tables as text, for what prints as one, and times in words."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

# Wide enough that no cell is cut where the output goes to a file or a pipe.
_FILE_WIDTH = 4000


def table(columns: Mapping[str, str], rows: Sequence[Sequence[str]]) -> str:
    """Text of a table; columns maps each heading to "left" or "right"."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else _FILE_WIDTH
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, justify in columns.items():
        grid.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console(file=io.StringIO(), width=width, force_terminal=False, markup=False)
    console.print(grid)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)


def time_text(ms: float) -> str:
    """Three digits and the unit, "0.312 ms"."""
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms:.0f} ms"
