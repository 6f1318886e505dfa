"""An exception as one line, for reasons, reports and tables."""

from __future__ import annotations


def one_line(error: BaseException, width: int | None = 100) -> str:
    """The first line of the message that says something, shortened to `width`; None: as it is.

    The exception's class where there is no such line.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if width is None or len(text) <= width else text[: width - 3] + "..."


def kind_and_line(error: BaseException) -> str:
    """`one_line` behind the exception's class, "KeyError: 'conv1'"."""
    kind, text = type(error).__name__, one_line(error)
    return kind if text == kind else f"{kind}: {text}"
