"""Convolution + BN (+ ReLU, + max-pool) outside residual blocks, by itself or inside a parent."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import check, guard, packing
from ._caller import is_running, running_sequences
from ._fused import FusedModule, Run
from ._launches import Launch, prepare_at_once, prepare_unit
from ._links import (
    changed,
    facts_of,
    has_global_hooks,
    has_hooks,
    hook_facts,
    link,
    links_below,
    run_plainly,
)
from ._refusals import refuse_altered, refuse_mixture, refuse_unit
from ._wrapper import Wrapper
from .recipe import ConvUnit, NoMatch, Site


class _ConvBn(nn.Module):
    """The plain module behind FusedConvBN."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.act = act
        self.training = conv.training

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return nn.functional.relu(y) if self.act == "relu" else y


class _OneUnit(FusedModule):
    """A fused module of a single convolution."""

    kind = "conv_bn"

    def _out_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        return [self._out_size(self._units[0], size)]

    def _compose(self, x: Tensor, run: Run) -> Tensor:
        return run(0, x, None)

    def _launches(self, x: Tensor, packed: packing.Packing) -> Launch | None:
        if x.dim() != 4:
            return None
        at_once = prepare_at_once(packed.units, None, x, adds=False)
        if at_once is not None:
            return at_once
        run = prepare_unit(packed.units[0], tuple(x.shape), x.device)
        return lambda x: run(x, None)

    def _at_once(self, size: tuple[int, ...], packed: packing.Packing) -> packing.AtOnce | None:
        joined = packing.at_once(packed.units)
        one = {"has_shortcut": False, "adds": False, "pool": self._units[0].pool}
        return packing.AtOnce(joined.tensors, joined.keywords | one)


class FusedConvBN(_OneUnit):
    """act(bn(conv(x))) as one op in eval mode, for stems and other plain sequences.

    conv: nn.Conv2d; bn: nn.BatchNorm2d with running statistics and conv's channels; act: "relu" or
    "none". The children are `conv` and `bn` themselves, not copies. Output: dense channels_last.
    Raises TypeError or ValueError for anything else.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str = "relu") -> None:
        check.one_of("FusedConvBN", "act", act, check.ACTIVATIONS)
        for name, value, kind in (("conv", conv, nn.Conv2d), ("bn", bn, nn.BatchNorm2d)):
            if not isinstance(value, kind):
                raise TypeError(
                    f"FusedConvBN: {name} must be a {kind.__name__}, got {type(value).__name__}"
                )
        unit = ConvUnit(conv, bn, act, "conv", "bn")
        try:
            refuse_altered(conv, "conv")
            refuse_altered(bn, "bn")
            refuse_unit(unit)
            refuse_mixture((unit,))
        except NoMatch as reason:
            raise ValueError(f"FusedConvBN: {reason}") from None
        plain = _ConvBn(conv, bn, act)
        super().__init__(plain, (unit,), tuple(links_below(plain)))


_POOL_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def _pool_settings(pool: nn.MaxPool2d) -> tuple[Any, ...]:
    return tuple(getattr(pool, name) for name in _POOL_SETTINGS)


@dataclass(eq=False)
class _Installed:
    """A site in its parent, seen by all of its slots. The first decides at every call whether it
    computes all layers or its own; the others pass on what it computed, and compute the rest."""

    parent: nn.Module
    site: Site
    names: tuple[str, ...]  # of the slots in the parent
    slots: list[Wrapper] = field(default_factory=list)
    pool_settings: tuple[Any, ...] | None = None
    _guard: Callable[[], bool] | None = None  # made when the site was last found whole
    _last: threading.local = field(default_factory=threading.local)  # what all computed together

    def is_whole(self) -> bool:
        """Whether nothing is broken; quickly, if the last call found the same."""
        if torch.compiler.is_compiling():
            return self.broken() is None
        if self._guard is not None and self._guard():
            return True
        whole = self.broken() is None
        self._guard = guard.watch(self.facts()) if whole else None
        return whole

    def is_called_whole(self) -> bool:
        """Whether who calls the first layer calls the others too, in their order.

        That is the parent's forward, for which it was proved, or a Sequential that holds them side
        by side, as `nn.Sequential(*net.children())` does. Anyone else may want what lies between
        them: a U-Net, say, the activations before the max-pool.
        """
        return is_running(self.parent) or any(map(self._is_in, running_sequences()))

    def _is_in(self, sequence: nn.Sequential) -> bool:
        layers, first = list(sequence._modules.values()), self.slots[0]
        at = layers.index(first) if first in layers else len(layers)
        return layers[at : at + len(self.slots)] == self.slots

    def computed(self, y: Tensor) -> Tensor:
        """Notes that y is what all layers compute together; returns it."""
        self._last.y = weakref.ref(y)
        return y

    def has_computed(self, x: Tensor, slot: Wrapper) -> bool:
        """Whether x is what this thread noted last; the last slot is the last to hear so."""
        last = getattr(self._last, "y", None)
        if last is None or last() is not x:
            return False
        if slot is self.slots[-1]:
            self._last.y = None
        return True

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=threading.local())

    def facts(self) -> list[guard.Fact]:
        """What `broken` looks at, while nothing is."""
        facts = []
        for name, slot in zip(self.names, self.slots, strict=True):
            facts.append(guard.item_is(self.parent._modules, name, slot))
            facts.append(guard.type_is(slot, type(slot)))
            facts += [*hook_facts(slot), *facts_of(slot.link)]
        if self.site.pool is not None:
            facts += [guard.attribute(self.site.pool, name) for name in _POOL_SETTINGS]
        return facts

    def broken(self) -> str | None:
        """Why each slot must act as its own original; None while the site is whole."""
        for name, slot in zip(self.names, self.slots, strict=True):
            if self.parent._modules.get(name) is not slot:
                return f"{name} was replaced"
            if type(slot) not in _SLOTS:
                return f"{name} became a {type(slot).__name__}"
            if has_hooks(slot):
                return f"{name} has hooks"
            reason = changed(slot.link)
            if reason is not None:
                return reason
        pool = self.site.pool
        if pool is not None and _pool_settings(pool) != self.pool_settings:
            return f"{self.site.pool_name} has other settings than it had"
        return None


class ConvSlot(_OneUnit, nn.Conv2d):
    """In the place of a convolution, with its keys: computes it, its BN, its ReLU, its max-pool.

    Slots are instances of the layers' classes, which code that looks for layers asks for:
    `torch.optim.swa_utils.update_bn`, `convert_sync_batchnorm`, loops that freeze every BN.
    """

    def __init__(self, installed: _Installed) -> None:
        unit = installed.site.unit
        super().__init__(unit.conv, (unit,), ())
        self.__dict__["_installed"] = installed
        self.__dict__["link"] = link({unit.conv_name: unit.conv}, unit.conv_name, unit.conv_name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        site = self._installed
        if torch.compiler.is_compiling() or (args and isinstance(args[0], fx.Proxy)):
            return super().forward(*args, **kwargs)
        if has_global_hooks() or not site.is_whole() or not site.is_called_whole():
            return run_plainly(self, *args, **kwargs)
        return site.computed(super().forward(*args, **kwargs))

    def _why_changed(self) -> str | None:
        if has_global_hooks():
            return "hooks on all modules are set"
        return self._installed.broken()

    def _structure_facts(self) -> list[guard.Fact]:
        # The flags, too, that _why_eager_now lets the originals follow.
        flags = [guard.attribute(slot, "training") for slot in self._installed.slots]
        return self._installed.facts() + flags

    def _why_eager_now(self, x: Tensor | None = None) -> str | None:
        for slot in self._installed.slots:
            slot.original()  # the BN's own training flag follows its slot's
        return super()._why_eager_now(x)

    def _run_original(self, x: Tensor) -> Tensor:
        y = run_plainly(self, x)
        if self._installed.broken() is not None:
            return y
        for slot in self._installed.slots[1:]:
            y = run_plainly(slot, y)
        return y


class PassSlot(Wrapper):
    """In the place of a layer that the ConvSlot has computed already: passes its input on."""

    def __init__(self, original: nn.Module, name: str, installed: _Installed) -> None:
        super().__init__(original)
        self.__dict__["_installed"] = installed
        self.__dict__["link"] = link({name: original}, name, name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return run_plainly(self, *args, **kwargs)
        x, site = args[0], self._installed
        if isinstance(x, fx.Proxy):
            return self.recorded(x)
        # A graph that is captured knows no weak references.
        captured = torch.compiler.is_compiling()
        passes = site.is_whole() if captured else site.has_computed(x, self)
        return x if passes else run_plainly(self, x)

    def extra_repr(self) -> str:
        return "computed by the convolution before it"


class BatchNormSlot(PassSlot, nn.BatchNorm2d):
    pass


class ReLUSlot(PassSlot, nn.ReLU):
    pass


class MaxPoolSlot(PassSlot, nn.MaxPool2d):
    pass


_PASS_SLOTS = {nn.BatchNorm2d: BatchNormSlot, nn.ReLU: ReLUSlot, nn.MaxPool2d: MaxPoolSlot}
_SLOTS = (ConvSlot, *_PASS_SLOTS.values())


def install_site(parent: nn.Module, site: Site) -> ConvSlot:
    """Fuses one site of a parent: slots take the places of all its layers."""
    layers = (site.unit.conv_name, site.unit.bn_name, site.act_name, site.pool_name)
    names = tuple(name for name in layers if name is not None)
    installed = _Installed(parent, site, names)
    if site.pool is not None:
        installed.pool_settings = _pool_settings(site.pool)
    originals = [parent._modules[name] for name in names]
    first = ConvSlot(installed)
    others = zip(originals[1:], names[1:], strict=True)
    installed.slots[:] = [
        first,
        *(_PASS_SLOTS[type(layer)](layer, name, installed) for layer, name in others),
    ]
    for name, slot in zip(names, installed.slots, strict=True):
        parent._modules[name] = slot
    return first
