"""When something was measured; without torch, for programs that must run where it does not."""

from __future__ import annotations

import datetime


def now() -> str:
    """In UTC, as records have it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
