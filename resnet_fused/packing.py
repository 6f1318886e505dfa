"""Packed weights: BN folded to scale and shift, a plan's weight layout, and when to do it again.

Packed weights are a cache, never state. They are made at the first call and checked at every one:
a parameter that was replaced, moved, cast or written to makes them stale. Version counters tell of
ordinary writes. Writes that bypass them (`tensor.data`, numpy) are found on the CPU by comparing
batch-norm values and samples of the weights, and everywhere after train() or eval() by a hash of
all values.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import guard, select
from ._streams import Readers
from .conv_shape import Geometry, as_pair
from .ops import _gpu
from .recipe import ConvUnit

if TYPE_CHECKING:
    from ._ready import Ready, ReadyOnGpu

_ops = torch.ops.resnet_fused


def fold(unit: ConvUnit) -> tuple[Tensor, Tensor]:
    """scale and shift, (out_channels,): bn(conv(x)) = (conv without bias)(x) * scale + shift.

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
    """The zero padding as (rows, columns); 'same' is symmetric where match accepted it."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        sides = zip(as_pair(conv.dilation), kernel_size(conv), strict=True)
        reach = [dilation * (size - 1) for dilation, size in sides]
        return (reach[0] // 2, reach[1] // 2)
    return as_pair(conv.padding)


def kernel_size(conv: nn.Conv2d) -> tuple[int, int]:
    """From the weights, which may have been replaced by smaller ones since the module was made."""
    return (conv.weight.shape[2], conv.weight.shape[3])


def geometry(conv: nn.Conv2d) -> Geometry:
    stride, dilation = as_pair(conv.stride), as_pair(conv.dilation)
    return Geometry(kernel_size(conv), stride, pair_padding(conv), dilation, conv.groups)


def out_size(op: str, conv: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the convolution's output for an input of `size`.

    Raises ValueError, in the name of `op`, where there is none.
    """
    return geometry(conv).out_size(op, size)


def conv_shape(
    conv: nn.Conv2d, dtype: torch.dtype, out_size: tuple[int, int], batch: int = 1
) -> select.ConvShape:
    """This convolution in `dtype` with outputs of out_size rows and columns, for `select`."""
    return select.ConvShape.of(
        geometry(conv),
        device=conv.weight.device,
        dtype=dtype,
        batch=batch,
        channels=(conv.weight.shape[1] * conv.groups, conv.weight.shape[0]),
        out_size=out_size,
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
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        return (self.weight, self.scale, self.shift)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of conv_bn_act_packed, behind x."""
        operands = {"packed": self.weight, "scale": self.scale, "shift": self.shift}
        return operands | self.keywords

    @property
    def geometry(self) -> Geometry:
        return Geometry.of(self.keywords)

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """(N, K, P, Q) for an input of `size`, (N, C, H, W), before a max-pool."""
        out = self.geometry.out_size("conv_bn_act_packed", size)
        return (size[0], self.scale.shape[0], *out)

    def pools_at_once(self, size: Sequence[int], device: torch.device) -> bool:
        """Whether one GPU kernel computes it and its max-pool for images of `size`."""
        plan, pool = self.keywords["plan"], self.keywords["pool"]
        where = (device, self.weight.dtype, size, self.scale.shape[0])
        return pool and _gpu.pools_at_once(plan, *where, self.geometry)

    @property
    def reason(self) -> str:
        """Why it runs as it does, for reports."""
        if not self.keywords["pool"]:
            return self.choice.reason
        smallest = (1, self.weight.shape[1], *self.keywords["kernel_size"])
        at_once = self.choice.plan == "stem" or self.pools_at_once(smallest, self.weight.device)
        how = "in the same pass" if at_once else "in a second pass"
        return f"{self.choice.reason}; its max-pool {how}"

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.weight, self.scale, self.shift))


@dataclass(frozen=True, eq=False)
class AtOnce:
    """Several packed convolutions as one op takes them."""

    tensors: tuple[list[Tensor], list[Tensor], list[Tensor]]  # packed weights, scales, shifts
    keywords: dict[str, Any]


def at_once(units: Sequence[PackedUnit]) -> AtOnce:
    """The units in this order."""
    keywords = [unit.keywords for unit in units]

    def pairs(name: str) -> list[int]:
        return [int(value) for k in keywords for value in k[name]]

    return AtOnce(
        ([u.weight for u in units], [u.scale for u in units], [u.shift for u in units]),
        {
            "kernel_sizes": pairs("kernel_size"),
            "strides": pairs("stride"),
            "paddings": pairs("padding"),
            "dilations": pairs("dilation"),
            "groups": [k["groups"] for k in keywords],
            "acts": [k["act"] for k in keywords],
            "plans": [k["plan"] for k in keywords],
        },
    )


CONV_KEYWORDS = ("stride", "padding", "dilation", "groups", "act")


def conv_keywords(unit: ConvUnit) -> dict[str, Any]:
    """CONV_KEYWORDS of this unit, as conv_bn_act takes them."""
    conv = unit.conv
    return {
        "stride": as_pair(conv.stride),
        "padding": pair_padding(conv),
        "dilation": as_pair(conv.dilation),
        "groups": conv.groups,
        "act": unit.act,
    }


def pack(unit: ConvUnit, dtype: torch.dtype, choice: select.Choice) -> PackedUnit:
    """Packs one convolution for computing in `dtype`; also inside a graph that is captured."""
    scale, shift = (t.detach() for t in fold(unit))
    weight = unit.conv.weight.detach().to(dtype)
    weight = _ops.pack_conv(weight, unit.conv.groups, plan=choice.plan)
    keywords = {"kernel_size": kernel_size(unit.conv), "plan": choice.plan, "pool": unit.max_pool}
    return PackedUnit(weight, scale, shift, conv_keywords(unit) | keywords, choice)


def run_unpacked(
    unit: ConvUnit,
    dtype: torch.dtype,
    choice: select.Choice,
    x: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """What pack(unit, dtype, choice)(x, residual) computes, in a graph that stays as it is: packed
    weights are kept by the op, by their content."""
    scale, shift = (t.detach() for t in fold(unit))
    weight = unit.conv.weight.detach().to(dtype)
    keywords = conv_keywords(unit) | {"plan": choice.plan, "pool": unit.max_pool}
    return _ops.conv_bn_act_kept(x, weight, scale, shift, residual, **keywords)


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


_MOST_CONTEXTS = 256  # image sizes whose choices are remembered


class _Stamp:
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
        self.sample = _ops.content_sample(self.on_cpu) if self.on_cpu else None
        self.hash = _ops.content_hash(self.tensors)

    def facts(self) -> list[guard.Fact] | None:
        """What `fits` looks at, apart from what is in the tensors on the CPU and where that lies.

        None where more must be looked at.
        """
        if self.copies or (self.on_cpu and len(self.on_cpu) != len(self.tensors)):
            return None
        facts = []
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
        if self.sample is not None and not _ops.content_equal(self.on_cpu, self.sample):
            return False
        return not self.copies or all(torch.equal(t, copy) for t, copy in self.copies)

    def fits_wholly(self) -> bool:
        """Whether every single value is what was packed."""
        return _ops.content_hash(self.tensors) == self.hash


def _finish(units: Sequence[ConvUnit]) -> None:
    """Waits until a GPU has written what was packed: other threads use it on their own streams."""
    device = units[0].conv.weight.device
    if device.type != "cuda":
        return
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()


@dataclass(eq=False)
class Packing:
    """What a module has packed, and what was made of it."""

    dtype: torch.dtype  # of the computation
    choices: tuple[select.Choice, ...]
    stamp: _Stamp
    units: tuple[PackedUnit, ...]
    derived: Any = None  # what the module needs to run them
    # By the shape of the input.
    ready: dict[torch.Size, Ready | ReadyOnGpu] = field(default_factory=dict)
    readers: Readers = field(init=False)

    def __post_init__(self) -> None:
        self.readers = Readers(t for unit in self.units for t in unit.operands)

    def serving(self, dtype: torch.dtype, choices: tuple[select.Choice, ...]) -> Packing | None:
        """These packed weights for choices of the same plans, whose reasons may be others; None for
        other plans or another dtype."""
        if self.dtype != dtype:
            return None
        if self.choices == choices:
            return self
        pairs = list(zip(self.units, choices, strict=True))
        if any(unit.choice.plan != choice.plan for unit, choice in pairs):
            return None
        other = copy.copy(self)  # with what is ready: reasons change nothing that is computed
        other.choices = choices
        other.units = tuple([replace(unit, choice=choice) for unit, choice in pairs])
        return other


class PackCache:
    """The packed weights of one module's units, for one dtype and one choice of plans at a time."""

    def __init__(self) -> None:
        self.packing: Packing | None = None
        self._lock = threading.RLock()  # threads whose first calls come together pack once
        self.doubted = False  # whether the next call compares whole contents
        self._choices: dict[Any, tuple[select.Choice, ...]] = {}
        self._largest_batch = 0

    def __reduce__(self) -> tuple:
        """Copies and pickles, whose tensors are others, start empty."""
        return type(self), ()

    def largest_batch(self, batch: int) -> int:
        """The largest batch since the weights were last dropped, this one included.

        Plans follow it: with more images other layouts pay, and a model that serves batches of
        every size would pack again at each change if they followed the batch itself.
        """
        if batch > self._largest_batch:
            self._largest_batch = batch
        return self._largest_batch

    def drop(self) -> None:
        with self._lock:
            self.packing = None
            self._choices = {}
            self._largest_batch = 0

    def held(self) -> tuple[PackedUnit, ...]:
        """What is packed at the moment, perhaps nothing, perhaps stale."""
        packing = self.packing
        return packing.units if packing else ()

    def ready(self, shape: torch.Size) -> Ready | ReadyOnGpu | None:
        """What may serve an input of that shape at once."""
        packing = self.packing
        return None if packing is None or self.doubted else packing.ready.get(shape)

    def get(
        self,
        units: Sequence[ConvUnit],
        dtype: torch.dtype,
        context: Any,
        choose_all: Callable[[], tuple[select.Choice, ...]],
    ) -> Packing:
        """The units packed for computing in dtype, packed again if anything changed.

        choose_all() gives a plan for each unit; it is asked once for each `context`, which is
        hashable and holds all that the choice depends on but the units themselves.
        """
        with self._lock:
            packing = self._get(units, dtype, context, choose_all)
        packing.readers.add_current()
        return packing

    def _get(
        self,
        units: Sequence[ConvUnit],
        dtype: torch.dtype,
        context: Any,
        choose_all: Callable[[], tuple[select.Choice, ...]],
    ) -> Packing:
        doubted, packing = self.doubted, self.packing
        fits = packing is not None and packing.stamp.fits()
        if fits and doubted:
            fits = packing.stamp.fits_wholly()
        if not fits:
            self.packing = None  # before the doubt goes: other threads would trust it
        self.doubted = False
        if not fits or len(self._choices) > _MOST_CONTEXTS:
            self._choices = {}
        choices = self._choices.get(context)
        if choices is None:
            choices = self._choices[context] = choose_all()
        serving = packing.serving(dtype, choices) if fits else None
        if serving is not None:
            self.packing = serving
            return serving
        with torch.no_grad():
            stamp = _Stamp(units)
            packed = tuple(
                pack(unit, dtype, choice) for unit, choice in zip(units, choices, strict=True)
            )
        _finish(units)
        self.packing = packing = Packing(dtype, choices, stamp, packed)
        return packing
