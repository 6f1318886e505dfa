"""What Linux tells of the processor in /proc/cpuinfo.

`root` arguments are for the tests, which fake /proc below a folder.
"""

from __future__ import annotations

import platform
from pathlib import Path

ROOT = Path("/")


def cpu_model(root: Path = ROOT) -> str:
    """The processor's name, "AMD EPYC 9R14"; elsewhere than on Linux what Python knows of it."""
    return cpuinfo("model name", root) or platform.processor() or platform.machine()


def cpuinfo(key: str, root: Path = ROOT) -> str | None:
    """The value for the first processor; the file says the same of the others, which takes time."""
    try:
        with open(root / "proc/cpuinfo") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except (OSError, UnicodeDecodeError):
        pass
    return None
