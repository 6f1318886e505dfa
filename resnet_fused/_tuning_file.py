"""The file in which measured answers outlive the process: where it is, reading and merging.

    {
     "format": "resnet-fused tuning",
     "version": 1,
     "machines": {
      "AMD EPYC 9R14, avx512, threads: 2, torch 2.13.0+cpu, resnet-fused 0.1.0, kernels 3f2a91bc": {
       "3x3 64->64 to 56x56 float32 cpu": {
        "batch": 1, "plan": "winograd4", "ms": {"direct": 0.95, "winograd4": 0.31, "torch": 1.06}
       }
      }
     }
    }

A file is believed as a whole or not at all: one that is torn, damaged, another program's or another
version's counts as absent, and is put aside, not overwritten, when there are answers to keep.
Writers lock the folder, read what others wrote, and rename a complete new file into place, so that
a reader sees one whole file or another.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _environment

try:
    import fcntl
except ImportError:  # not a Unix: two writers at the same moment may lose one's answers
    fcntl = None

FORMAT = "resnet-fused tuning"
VERSION = 1
OFF = ("none", "0")
MOST_BYTES = 1 << 24  # a whole net's answers take some 2 kB


@dataclass(frozen=True)
class Answer:
    """What was measured of one convolution with `batch` images.

    plan: the fastest. ms: milliseconds (median) of each plan; None for one that was not exact
    enough to be timed. configs: on a GPU, the configuration that a plan's time was measured with,
    where it was not the kernel's own choice.
    """

    batch: int
    plan: str
    ms: Mapping[str, float | None]
    configs: Mapping[str, str] = field(default_factory=dict)


Machines = dict[str, dict[str, Answer]]  # machine -> convolution -> answer


@dataclass(frozen=True)
class Contents:
    """machines: empty where there is no file or none that can be believed; problem: why not."""

    machines: Machines = field(default_factory=dict)
    problem: str = ""


def path(environ: Mapping[str, str] = os.environ) -> Path | None:
    """RESNET_FUSED_TUNE_FILE, else one in the user's cache folder; None where switched off."""
    named = environ.get(_environment.TUNE_FILE)
    if named in OFF:
        return None
    if named:
        return Path(named)
    cache = environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification tells to ignore relative ones.
        folder = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None
    return folder / "resnet_fused" / f"tuning-{VERSION}.json"


def read(path: Path) -> Contents:
    """What the file holds. Raises nothing, whatever it finds."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            return Contents(problem="is not a regular file")
        if status.st_size > MOST_BYTES:
            return Contents(problem=f"is larger than {MOST_BYTES >> 20} MiB")
        content = json.loads(path.read_bytes().decode())
    except FileNotFoundError:
        return Contents()
    except OSError as error:
        return Contents(problem=f"cannot be read ({error.strerror})")
    except (ValueError, RecursionError):
        return Contents(problem="is damaged: it is not JSON")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return Contents(problem=f'is no file of the format "{FORMAT}"')
    if content.get("version") != VERSION:
        return Contents(
            problem=f"has version {content.get('version')!r:.20} of the format, not {VERSION}"
        )
    try:
        return Contents(_machines(content["machines"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return Contents(problem="is damaged: an entry is not what it must be")


def merge(path: Path, machine: str, answers: Mapping[str, Answer]) -> Machines:
    """Adds one machine's answers to the file and returns all that it holds then.

    Answers of the same convolution are replaced. A file that cannot be believed is kept beside the
    new one as PATH.bak. Raises OSError, which leaves the file as it was.
    """
    path = Path(os.path.realpath(path))  # rename() would put a file in a link's place
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        found = read(path)
        if found.problem:
            if not path.is_file() or not os.access(path, os.R_OK):
                raise OSError(0, f"what is there {found.problem}")
            os.replace(path, f"{path}.bak")
        machines = found.machines | {machine: found.machines.get(machine, {}) | dict(answers)}
        _write(path, machines)
    return machines


def _write(path: Path, machines: Machines) -> None:
    entries = {
        machine: {shape: _entry(answer) for shape, answer in answers.items()}
        for machine, answers in machines.items()
    }
    document = {"format": FORMAT, "version": VERSION, "machines": entries}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x", encoding="ascii") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _entry(answer: Answer) -> dict[str, Any]:
    entry = {"batch": answer.batch, "plan": answer.plan, "ms": dict(answer.ms)}
    return entry | ({"configs": dict(answer.configs)} if answer.configs else {})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the writers of this folder; on file systems without locks, perhaps not."""
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _machines(value: Any) -> Machines:
    return {
        machine: {shape: _answer(entry) for shape, entry in answers.items()}
        for machine, answers in value.items()
    }


def _answer(entry: Any) -> Answer:
    """Raises any of the errors that `read` catches."""
    batch, plan = entry["batch"], entry["plan"]
    ms = {name: _milliseconds(value) for name, value in entry["ms"].items()}
    if type(batch) is not int or batch < 1 or ms[plan] is None:
        raise ValueError
    configs = entry.get("configs", {})
    if any(type(text) is not str or name not in ms for name, text in configs.items()):
        raise ValueError
    return Answer(batch, plan, ms, configs)


def _milliseconds(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < float(value) < math.inf:
        raise ValueError
    return float(value)
