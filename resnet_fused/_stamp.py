"""Whether packed weights are stale: what the tensors and settings were that they were made from.

A parameter that was replaced, moved, cast or written to makes them stale. Version counters tell of
ordinary writes. Writes that bypass them (`tensor.data`, numpy) are found on the CPU by comparing
batch-norm values and samples of the weights, and everywhere after train() or eval() by a hash of
all values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import guard
from .recipe import ConvUnit

_ops = torch.ops.resnet_fused


def places(unit: ConvUnit) -> list[tuple[dict[str, Tensor | None], str]]:
    """Where every tensor is kept that packing reads: a module's own dict, and the key."""
    found = [(unit.conv._parameters, "weight"), (unit.conv._parameters, "bias")]
    if unit.bn is not None:
        found += [(unit.bn._parameters, "weight"), (unit.bn._parameters, "bias")]
        found += [(unit.bn._buffers, "running_mean"), (unit.bn._buffers, "running_var")]
    return found


def tensors(unit: ConvUnit) -> list[Tensor]:
    """Every tensor that packing reads."""
    # No assignment inside the comprehension: torch.compile cannot trace that on Python 3.11.
    held = [owner.get(key) for owner, key in places(unit)]
    return [tensor for tensor in held if tensor is not None]


_CONV_SETTINGS = ("stride", "padding", "dilation", "groups")


def _settings(unit: ConvUnit) -> tuple[Any, ...]:
    """Every attribute that packing reads and that can be edited in place."""
    conv, bn = unit.conv, unit.bn
    eps = bn.eps if bn is not None else None
    return (*[getattr(conv, name) for name in _CONV_SETTINGS], eps)


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class Stamp:
    """What the tensors and settings of some units were when they were packed."""

    def __init__(self, units: Sequence[ConvUnit]) -> None:
        self.units = units
        self.settings = [_settings(unit) for unit in units]
        self.tensors = [t for unit in units for t in tensors(unit)]
        # Straight from the modules' dicts: nn.Module's getattr would cost 0.4 us for each.
        self.records = [
            (owner, key, tensor, _version(tensor), _address(tensor))
            for unit in units
            for owner, key in places(unit)
            for tensor in (owner.get(key),)
        ]
        self.shapes = [(unit.conv.weight, unit.conv.weight.shape) for unit in units]
        # Inference tensors have no version counter: the whole content is compared.
        self.copies = [(t, t.clone()) for t in self.tensors if t.is_inference()]
        self.on_cpu = [t for t in self.tensors if t.device.type == "cpu"]
        self.snapshot = guard.snapshot(self.on_cpu)
        self.sample = None
        if self.on_cpu and self.snapshot is None:
            self.sample = _ops.content_sample(self.on_cpu)
        self.hash = _ops.content_hash(self.tensors)

    def facts(self) -> list[guard.Fact] | None:
        """What `fits` looks at; None where that is more than facts."""
        if self.copies or (self.on_cpu and len(self.on_cpu) != len(self.tensors)):
            return None
        if self.on_cpu and self.snapshot is None:
            return None
        facts = [guard.lies(self.snapshot)] if self.on_cpu else []
        for unit in self.units:
            facts += [guard.attribute(unit.conv, name) for name in _CONV_SETTINGS]
            if unit.bn is not None:
                facts.append(guard.attribute(unit.bn, "eps"))
        for owner, key, tensor, version, address in self.records:
            if tensor is None:
                facts.append(
                    guard.item_is(owner, key, None) if key in owner else guard.absent(owner, key)
                )
                continue
            facts += [guard.item_is(owner, key, tensor), guard.version_is(tensor, version)]
            if not self.on_cpu:
                facts.append(guard.returns(tensor.data_ptr, address))
        return facts

    def fits(self) -> bool:
        """Whether the units still hold what was packed, as far as every call checks."""
        for unit, settings in zip(self.units, self.settings, strict=True):
            if _settings(unit) != settings:
                return False
        for owner, key, tensor, version, address in self.records:
            if owner.get(key) is not tensor:
                return False
            if tensor is None:
                continue
            if version is not None and tensor._version != version:
                return False
            # Another address means another device, dtype or storage.
            if tensor.data_ptr() != address:
                return False
        if any(weight.shape != shape for weight, shape in self.shapes):
            return False
        if self.on_cpu and self.snapshot is not None and not self.snapshot():
            return False
        if self.sample is not None and not _ops.content_equal(self.on_cpu, self.sample):
            return False
        return not self.copies or all(torch.equal(t, copy) for t, copy in self.copies)

    def fits_wholly(self) -> bool:
        """Whether every single value is what was packed."""
        return _ops.content_hash(self.tensors) == self.hash
