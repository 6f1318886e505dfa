"""What stands in the places of a parent's convolution, BN, ReLU and max-pool: one op for all.

The parent's forward goes on calling each of them. The first computes all, the others pass it on.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import guard
from ._caller import call_path, calling_sequence
from ._links import changed, facts_of, has_global_hooks, has_hooks, hook_facts, link
from ._wrapper import Wrapper, run_plainly
from .conv_bn import OneUnit
from .recipe import Site

_POOL_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


# Attributes that make a call of a layer something else, while its class stays what it was.
_OWN_CALLS = {
    "forward": "forward of {} was patched",
    "_compiled_call_impl": "{} is compiled on its own",
}


def _pool_settings(pool: nn.MaxPool2d) -> tuple[Any, ...]:
    return tuple(getattr(pool, name) for name in _POOL_SETTINGS)


@dataclass(eq=False)
class _Installed:
    """A site in its parent, seen by all of its slots. The first decides at every call whether it
    computes all layers or its own; the others pass on what it computed, and compute the rest."""

    parent: nn.Module | None  # None: of a layer that was copied without it
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
        return call_path(self.parent) == self.site.path or self._is_in(calling_sequence())

    def _is_in(self, sequence: nn.Sequential | None) -> bool:
        if sequence is None:
            return False
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

    def __deepcopy__(self, memo: dict[int, Any]) -> _Installed:
        """Of a copied parent where that is copied, too; a layer copied by itself is on its own."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        alone = {} if id(self.parent) in memo else {"parent": None, "slots": []}
        state = self.__getstate__() | {"_guard": None} | alone
        twin.__setstate__({key: copy.deepcopy(value, memo) for key, value in state.items()})
        return twin

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
            facts += [guard.absent(slot.__dict__, key) for key in _OWN_CALLS]
            facts += [*hook_facts(slot), *facts_of(slot.link)]
        if self.site.max_pool is not None:
            facts += [guard.attribute(self.site.max_pool, name) for name in _POOL_SETTINGS]
        return facts

    def broken(self) -> str | None:
        """Why each slot must act as its own original; None while the site is whole."""
        if self.parent is None:
            return "it was copied without its parent"
        for name, slot in zip(self.names, self.slots, strict=True):
            if self.parent._modules.get(name) is not slot:
                return f"{name} was replaced"
            if type(slot) not in _SLOTS:
                return f"{name} became a {type(slot).__name__}"
            if has_hooks(slot):
                return f"{name} has hooks"
            for key, what in _OWN_CALLS.items():
                if key in slot.__dict__:
                    return what.format(name)
            reason = changed(slot.link)
            if reason is not None:
                return reason
        pool = self.site.max_pool
        if pool is not None and _pool_settings(pool) != self.pool_settings:
            return f"{self.site.max_pool_name} has other settings than it had"
        return None


class ConvSlot(OneUnit, nn.Conv2d):
    """In the place of a convolution, with its keys: computes it, its BN, its ReLU, its max-pool.

    Slots are instances of the layers' classes, which code that looks for layers asks for:
    `torch.optim.swa_utils.update_bn`, `convert_sync_batchnorm`, loops that freeze every BN.
    """

    def __init__(self, installed: _Installed) -> None:
        unit = installed.site.unit
        super().__init__(unit.conv, (unit,), ())
        self.__dict__["_installed"] = installed
        self.__dict__["link"] = link({unit.conv_name: unit.conv}, unit.conv_name, unit.conv_name)

    @property
    def _error_name(self) -> str:
        return f"convolution {self._installed.site.unit.conv_name}"

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
    layers = (site.unit.conv_name, site.unit.bn_name, site.act_name, site.max_pool_name)
    names = tuple(name for name in layers if name is not None)
    installed = _Installed(parent, site, names)
    if site.max_pool is not None:
        installed.pool_settings = _pool_settings(site.max_pool)
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
