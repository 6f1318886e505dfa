"""report: which parts of a model run fused, on what, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from . import check
from ._call import check_example, evaluating, run
from ._fused import FusedModule
from ._survey import join, survey
from ._tables import table


@dataclass(frozen=True)
class Row:
    """One fused module, or one that was left alone.

    name: its path in the model. kind: basic, bottleneck or conv_bn. fused: whether the next call
    runs fused. backend: what computes it, convolution by convolution where they differ. reason: why
    this backend, or why not fused. packed_bytes: memory of its packed weights.
    """

    name: str
    kind: str
    fused: bool
    backend: str
    reason: str
    packed_bytes: int


class Report(Sequence[Row]):
    """The rows in the order of the model; prints as a table."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index):
        return self._rows[index]

    def __str__(self) -> str:
        if not self._rows:
            return "no residual block and no conv-BN sequence"
        rows = [
            (
                row.name or "(the model)",
                row.kind,
                "yes" if row.fused else "no",
                row.backend,
                row.reason,
                _size(row.packed_bytes),
            )
            for row in self._rows
        ]
        fused = sum(row.fused for row in self._rows)
        packed = _size(sum(row.packed_bytes for row in self._rows)) or "0 bytes"
        last = f"{fused} of {len(self)} fused, {packed} packed"
        headings = ("name", "kind", "fused", "backend", "reason")
        return table({**dict.fromkeys(headings, "left"), "packed": "right"}, rows) + f"\n{last}"

    __repr__ = __str__


def report(fused: nn.Module, x: Any = None) -> Report:
    """What runs fused in a model, and what was left alone and why.

    x: an example input (a tensor, a tuple of arguments, a dict of keyword arguments). The model
    runs on it once in eval mode without gradients, and the report tells of that run: backends may
    depend on shapes. Training flags, BN statistics and random states stay what they were. Without x
    the backends are those of the shapes seen so far, or "not run yet".
    Raises TypeError for arguments of another kind and ValueError for a model that cannot run on x.
    """
    check.module("report", "fused", fused)
    if x is None:
        return Report(_rows(fused))
    check_example("report", x)
    with evaluating(fused):
        run("report", "fused", fused, x)
        return Report(_rows(fused))


def _rows(model: nn.Module) -> list[Row]:
    rows: dict[str, Row] = {}
    for name, module in model.named_modules():
        if isinstance(module, FusedModule):
            status = module.status()
            rows[name] = Row(
                name, module.kind, status.fused, status.backend, status.reason, status.packed_bytes
            )
    found = survey(model)
    later = "can be fused: resnet_fused.fuse does it"
    ready = [(name, recipe.kind) for name, recipe in found.blocks]
    ready += [(join(parent, site.unit.conv_name), "conv_bn") for parent, site in found.sites]
    left = [(name, kind, later) for name, kind in ready]
    left += [(alone.name, alone.kind, alone.reason) for alone in found.left]
    for name, kind, reason in left:
        rows[name] = Row(name, kind, False, "eager", reason, 0)
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(rows.values(), key=lambda row: order[row.name])


def _size(count: int) -> str:
    if count == 0:
        return ""
    for unit, bytes_each in (("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_each:
            return f"{count / bytes_each:.1f} {unit}"
    return f"{count} bytes"
