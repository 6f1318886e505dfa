"""When something was measured, as records have it."""

from __future__ import annotations

import datetime


def now() -> str:
    """In UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
