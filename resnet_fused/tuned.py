"""What `tune` measured on this machine: the answers that `select` asks before its own rule.

An answer holds for one processor: CPU model, instruction set and threads, or GPU and driver; and
for versions of torch and of this package and the build of the kernels. And for one convolution,
select.ConvShape, whose text is the key. On the CPU the batch is no part of it: packed weights have
one layout at a time, and batches that take turns would pack at every call. So a convolution has one
answer, from the batch that was measured last. On a GPU all plans share a layout, and each batch has
an answer of its own.

The file is read once, when the package is imported: torch.compile captures the lookup but could not
capture reading a file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _extension, _tuning_file, guard
from ._capture import constant_in_graphs
from ._cpuinfo import cpu_model
from ._gpuinfo import cuda_kernels_id, processor, triton_kernels_id
from ._tuning_file import Answer, Machines
from ._version import __version__
from .conv_shape import ConvShape, is_static

_table: Machines = {}
_revision = 0
_cpu: list[str] = []  # asked for once, at the first answer


@constant_in_graphs
def machine(device: str = "cpu", index: int = 0) -> str:
    """What an answer depends on beside the convolution, as one line.

    device: a type of device; index: which one. A graph holds the line of its capture;
    torch.compile captures again for other threads.
    """
    if device == "cuda":
        kernels = f"cuda kernels {cuda_kernels_id()}, triton kernels {triton_kernels_id()}"
        return f"{processor(index)}, {_versions()}, {kernels}"
    if not _cpu:
        _cpu.append(cpu_model())
    return f"{_cpu[0]}, {_extension.cpu_isa()}, threads: {torch.get_num_threads()}, {_versions()}"


def _versions() -> str:
    return (
        f"torch {torch.__version__}, resnet-fused {__version__}, kernels {_extension.kernels_id()}"
    )


def answers(device: str = "cpu", index: int = 0) -> Mapping[str, Answer]:
    """Convolution -> answer, of this processor, the CPU with the present number of threads."""
    if not _table:
        return {}
    return _table.get(machine(device, index), {})


def config(plan: str, shape: ConvShape) -> str:
    """The configuration that a plan's kernel was fastest with, "" for its own choice."""
    if not _table or not is_static(shape.batch):
        return ""
    answer = answers(shape.device, shape.index).get(str(shape))
    return "" if answer is None else answer.configs.get(plan, "")


def state() -> tuple[int, int]:
    """Equal while no answer can have changed."""
    return (_revision, torch.get_num_threads() if _table else 0)


def facts() -> list[guard.Fact]:
    """As `state`, for a guard."""
    facts = [
        guard.item_is(globals(), "_table", _table),
        guard.item_is(globals(), "_revision", _revision),
    ]
    if _table:
        facts.append(guard.returns(torch.get_num_threads, torch.get_num_threads()))
    return facts


def load(environ: Mapping[str, str] = os.environ) -> None:
    """Reads the file, in place of what this process knows. Warns once of one that is no use."""
    global _table, _revision
    path = _tuning_file.path(environ)
    found = _tuning_file.read(path) if path else _tuning_file.Contents()
    if found.problem:
        warnings.warn(
            f"resnet_fused: the tuning file {path} {found.problem}, so it counts as absent",
            RuntimeWarning,
            stacklevel=2,
        )
    _table = found.machines
    _revision += 1


def learn(
    new: Mapping[str, Answer],
    environ: Mapping[str, str] = os.environ,
    *,
    device: str = "cpu",
    index: int = 0,
) -> Path | None:
    """Takes answers for this processor into this process and into the file; returns the file.

    None where there is none: switched off, or, with a warning, because it cannot be written.
    """
    global _table, _revision
    here, path, known = machine(device, index), _tuning_file.path(environ), _table
    if path is not None:
        try:
            known = _tuning_file.merge(path, here, new)
        except OSError as error:
            warnings.warn(
                f"resnet_fused: what was measured holds in this process only, because "
                f"{path} cannot be written: {error.strerror or error}",
                RuntimeWarning,
                stacklevel=4,  # past tune and _learn
            )
            path = None
    _table = known | {here: _table.get(here, {}) | known.get(here, {}) | dict(new)}
    _revision += 1
    return path


@dataclass(frozen=True)
class Status:
    """What the doctor tells of the file. path: None where switched off or no home is known."""

    path: Path | None
    exists: bool = False
    problem: str = ""
    here: int = 0  # convolutions with an answer for this machine as it is now
    elsewhere: int = 0  # with an answer for other threads, versions or machines
    writable: bool = True


def status(environ: Mapping[str, str] = os.environ) -> Status:
    """Looks at the file anew."""
    path = _tuning_file.path(environ)
    if path is None:
        return Status(None)
    found = _tuning_file.read(path)
    try:
        here = len(found.machines.get(machine(), {}))
    except RuntimeError:  # RESNET_FUSED_ISA asks for what is not there
        here = 0
    total = sum(map(len, found.machines.values()))
    return Status(
        path, os.path.lexists(path), found.problem, here, total - here, can_write(path.parent)
    )


def can_write(folder: Path) -> bool:
    """Whether a file can be made in a folder that may have to be made first."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


load()
