"""Packed weights: BN folded to scale and shift, weights in a plan's layout, and when to do it again.

Packed weights are a cache, never state. They are made at the first call and checked at every one:
a parameter that was replaced, moved, cast or written to makes them stale. Version counters tell of
ordinary writes. Writes that bypass them (`tensor.data`, numpy) are found on the CPU by comparing
batch-norm values and samples of the weights, and everywhere after train() or eval() by a hash of
all values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import select
from .recipe import ConvUnit

_ops = torch.ops.resnet_fused


def fold(unit: ConvUnit) -> tuple[Tensor, Tensor]:
    """scale and shift, (out_channels,), so that bn(conv(x)) = (conv without bias)(x) * scale + shift.

    Folded in float64; returned in float32, float64 for float64 weights. Differentiable.
    """
    conv, bn = unit.conv, unit.bn
    wide = torch.float64
    result = torch.float64 if conv.weight.dtype == wide else torch.float32
    shift = conv.bias.to(wide) if conv.bias is not None else None
    if bn is None:
        scale = conv.weight.new_ones(conv.weight.shape[0], dtype=wide)
        shift = torch.zeros_like(scale) if shift is None else shift
        return scale.to(result), shift.to(result)
    scale = (bn.running_var.to(wide) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.to(wide)
    mean = bn.running_mean.to(wide)
    shift = (-mean if shift is None else shift - mean) * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(wide)
    return scale.to(result), shift.to(result)


def pair_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """The convolution's zero padding as (rows, columns); 'same' is symmetric where match accepted it."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        reach = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return (reach[0] // 2, reach[1] // 2)
    return tuple(conv.padding)


def kernel_size(conv: nn.Conv2d) -> tuple[int, int]:
    """From the weights, which may have been replaced by smaller ones since the module was made."""
    return (conv.weight.shape[2], conv.weight.shape[3])


def shape_of(conv: nn.Conv2d, dtype: torch.dtype) -> select.ConvShape:
    return select.ConvShape(
        device=conv.weight.device.type,
        dtype=dtype,
        in_channels=conv.weight.shape[1] * conv.groups,
        out_channels=conv.weight.shape[0],
        kernel=kernel_size(conv),
        stride=conv.stride,
        dilation=conv.dilation,
        groups=conv.groups,
    )


@dataclass(frozen=True, eq=False)
class PackedUnit:
    """One convolution ready to run: operands and keywords of conv_bn_act_packed."""

    weight: Tensor
    scale: Tensor
    shift: Tensor
    keywords: dict[str, Any]
    choice: select.Choice

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _ops.conv_bn_act_packed(
            x, self.weight, self.scale, self.shift, residual, **self.keywords
        )

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.weight, self.scale, self.shift))


CONV_KEYWORDS = ("stride", "padding", "dilation", "groups", "act")


def conv_keywords(unit: ConvUnit) -> dict[str, Any]:
    """CONV_KEYWORDS of this unit, as conv_bn_act takes them."""
    conv = unit.conv
    return {
        "stride": conv.stride,
        "padding": pair_padding(conv),
        "dilation": conv.dilation,
        "groups": conv.groups,
        "act": unit.act,
    }


def pack(unit: ConvUnit, dtype: torch.dtype, exact_nonfinite: bool = False) -> PackedUnit:
    """Packs one convolution for computing in `dtype`. Takes part in a graph that is being captured."""
    choice = select.choose(shape_of(unit.conv, dtype), exact_nonfinite=exact_nonfinite)
    scale, shift = (t.detach() for t in fold(unit))
    weight = unit.conv.weight.detach().to(dtype)
    weight = _ops.pack_conv(weight, unit.conv.groups, plan=choice.plan)
    keywords = conv_keywords(unit) | {"kernel_size": kernel_size(unit.conv), "plan": choice.plan}
    return PackedUnit(weight, scale, shift, keywords, choice)


def tensors(unit: ConvUnit) -> list[Tensor]:
    """Every tensor that packing reads. Straight from the dicts: nn.Module's getattr costs 0.4 us each."""
    conv, bn = unit.conv, unit.bn
    found = [conv._parameters["weight"], conv._parameters["bias"]]
    if bn is not None:
        found += [bn._parameters["weight"], bn._parameters["bias"]]
        found += [bn._buffers["running_mean"], bn._buffers["running_var"]]
    return [t for t in found if t is not None]


def _settings(unit: ConvUnit) -> tuple[Any, ...]:
    """Every attribute that packing reads and that can be edited in place."""
    conv, bn = unit.conv, unit.bn
    eps = bn.eps if bn is not None else None
    return (conv.stride, conv.padding, conv.dilation, conv.groups, eps)


class _Stamp:
    """What the tensors and settings of some units were when they were packed."""

    def __init__(self, units: Sequence[ConvUnit]) -> None:
        self.tensors = [t for unit in units for t in tensors(unit)]
        self.settings = [_settings(unit) for unit in units]
        self.places = [(t.data_ptr(), t.dtype) for t in self.tensors]
        # Inference tensors have no version counter: the whole content is compared.
        self.versions = [None if t.is_inference() else t._version for t in self.tensors]
        self.copies = [t.clone() for t in self.tensors if t.is_inference()]
        # One sample a device: a model may be spread over several.
        self.on_cpu = [t for t in self.tensors if t.device.type == "cpu"]
        self.sample = _ops.content_sample(self.on_cpu) if self.on_cpu else None
        self.hash = _ops.content_hash(self.tensors)

    def fits(self, units: Sequence[ConvUnit]) -> bool:
        """Whether the units still hold what was packed, as far as every call checks."""
        at = 0
        known, versions, places = self.tensors, self.versions, self.places
        for unit, settings in zip(units, self.settings, strict=True):
            if _settings(unit) != settings:
                return False
            for tensor in tensors(unit):
                if at == len(known) or tensor is not known[at]:
                    return False
                version = versions[at]
                if version is not None and (tensor.is_inference() or tensor._version != version):
                    return False
                if (tensor.data_ptr(), tensor.dtype) != places[at]:
                    return False
                at += 1
        if at != len(known):
            return False
        if self.sample is not None and not _ops.content_equal(self.on_cpu, self.sample):
            return False
        return not self.copies or self._copies_fit()

    def _copies_fit(self) -> bool:
        inference = [t for t, version in zip(self.tensors, self.versions, strict=True) if version is None]
        return all(torch.equal(t, copy) for t, copy in zip(inference, self.copies, strict=True))

    def fits_wholly(self) -> bool:
        """Whether every single value is what was packed."""
        return _ops.content_hash(self.tensors) == self.hash


class PackCache:
    """The packed weights of the units of one module, for one dtype and one choice at a time."""

    def __init__(self) -> None:
        self._entry: tuple[Any, _Stamp, tuple[PackedUnit, ...]] | None = None
        self._doubted = False

    def doubt(self) -> None:
        """At the next call compare whole contents: train() and eval() were called."""
        self._doubted = True

    def drop(self) -> None:
        self._entry = None

    def held(self) -> tuple[PackedUnit, ...]:
        """What is packed at the moment, perhaps nothing, perhaps stale."""
        entry = self._entry
        return entry[2] if entry else ()

    def get(
        self, units: Sequence[ConvUnit], dtype: torch.dtype, exact_nonfinite: bool = False
    ) -> tuple[PackedUnit, ...]:
        """The packed units for computing in dtype, packed again if anything changed."""
        # Threads may pack at the same time; each entry is whole, the last one stays.
        key = (dtype, exact_nonfinite, select.force())
        entry = self._entry
        if entry is not None and entry[0] == key and entry[1].fits(units):
            if not self._doubted:
                return entry[2]
            self._doubted = False
            if entry[1].fits_wholly():
                return entry[2]
        self._doubted = False
        with torch.no_grad():
            stamp = _Stamp(units)
            packed = tuple(pack(unit, dtype, exact_nonfinite) for unit in units)
        self._entry = (key, stamp, packed)
        return packed
