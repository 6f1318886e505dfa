"""Plants bugs in copies of kernels' sources: what is common to planted_*.py.

A copy of the sources gets a switch at each place: `(planted == 7 ? (bug) : (source))`, or an if
around a whole statement. So one compilation holds many bugs, and 0 is the kernel as it is.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emulated_sm90 import CSRC


@dataclass(frozen=True)
class Bug:
    name: str
    file: str  # in csrc/cuda
    source: str  # statements, or an expression
    bug: str
    report: str = ""  # what the emulator says of it, where it is not left to the numbers
    ci: bool = False  # planted in `make test` too
    context: str = ""  # what holds the source, where that is in the file more than once


def _find(text: str, part: str, name: str) -> tuple[int, int]:
    """Where `part` is, whatever the formatter made of its white space."""
    pattern = r"\s*".join(map(re.escape, "".join(part.split())))
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise ValueError(f"{name}: {part!r} is {len(found)} times in the source")
    return found[0].span()


def spot(bug: Bug) -> tuple[int, int]:
    """Where in its file the source is that the bug replaces."""
    text = (CSRC / "cuda" / bug.file).read_text()
    start, end = _find(text, bug.context or bug.source, bug.name)
    if not bug.context:
        return start, end
    a, b = _find(text[start:end], bug.source, bug.name)
    return start + a, start + b


def rounds(bugs: Sequence[Bug]) -> list[list[Bug]]:
    """As few lists as a greedy walk finds in which no two bugs overlap in the source."""
    lists: list[list[Bug]] = []
    for bug in bugs:
        start, end = spot(bug)
        for group in lists:
            others = [spot(o) for o in group if o.file == bug.file]
            if all(end <= a or b <= start for a, b in others):
                group.append(bug)
                break
        else:
            lists.append([bug])
    return lists


def plant(folder: Path, bugs: Sequence[Bug], kernel: str) -> Path:
    """A copy of csrc in which `<kernel>_plant(n)`, n > 0, switches to bug number n - 1."""
    csrc = folder / "csrc"
    shutil.rmtree(csrc, ignore_errors=True)
    shutil.copytree(CSRC / "cuda", csrc / "cuda")
    shutil.copy(CSRC / "check.h", csrc)
    for name in {bug.file for bug in bugs}:
        path = csrc / "cuda" / name
        text = path.read_text()
        spots = [(*spot(bug), number + 1) for number, bug in enumerate(bugs) if bug.file == name]
        for start, end, number in sorted(spots, reverse=True):
            bug, source = bugs[number - 1].bug, text[start:end]
            if source.endswith(";"):
                switch = f"if (planted == {number}) {{ {bug} }} else {{ {source} }}"
            else:
                switch = f"(planted == {number} ? ({bug}) : ({source}))"
            text = text[:start] + switch + text[end:]
        path.write_text(text.replace("#pragma once", "#pragma once\nextern int planted;", 1))
    with (csrc / "cuda" / "emulate" / f"run_{kernel}.cpp").open("a") as end:
        end.write(f'\nint planted;\nextern "C" void {kernel}_plant(int n) {{ planted = n; }}\n')
    return csrc
