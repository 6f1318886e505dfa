"""Printing that all commands share: one console, one progress bar, numbers as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from rich.console import Console

from .._progress import progress_bar

__all__ = ["coloured_ratio", "console", "extra", "milliseconds", "progress_bar"]

PIPE_WIDTH = 110  # columns when the output is a file or a pipe, which has no width of its own


def console() -> Console:
    """A console on the standard output of this moment (a test runner may have replaced it)."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=PIPE_WIDTH)


def extra(load: Callable[[], Any], package: str, purpose: str) -> Any:
    """load(), which imports `package`; where that is missing, one sentence that names the extra."""
    try:
        return load()
    except ImportError as error:
        raise click.ClickException(
            f"{purpose} needs {package}, which is not installed: pip install 'resnet-fused[demo]'"
        ) from error


def milliseconds(seconds: float) -> str:
    """Three significant digits or so, "8.43", "132"."""
    ms = 1e3 * seconds
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def coloured_ratio(ratio: float) -> str:
    """How many times as fast as the standard, green for a gain and red for a loss: "1.31x"."""
    colour = "green" if ratio >= 1.005 else "red" if ratio < 0.995 else "default"
    return f"[{colour}]{ratio:.2f}x[/{colour}]"
