"""What all fused modules share: when to run fused, on which operands, what to tell the report."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import _unit_runs, check, guard, packing, select
from ._capture import is_exported_to_onnx
from ._chain import Chain, passes_on
from ._launches import Launch
from ._links import GLOBAL_HOOK_FACTS, Link, changed, facts_of, has_global_hooks
from ._pack_cache import PackCache, Packing
from ._ready import Ready, ReadyOnGpu, can_be_ready, takes_launches
from ._refusals import refuse_edited, refuse_mixture
from ._stamp import tensors
from ._unit_runs import Run
from ._wrapper import Wrapper
from .ops import is_autocast_on
from .ops._transforms import is_dual, is_transformed
from .recipe import ConvUnit, NoMatch

NOT_RUN_YET = "not run yet"

watchers: list[Callable[[FusedModule, Tensor, torch.dtype], None]] = []
"""Called with a module, its input and the computation's dtype when it chooses plans: for tune."""


@dataclass(frozen=True)
class Status:
    """One row of the report, without the module's name."""

    fused: bool
    backend: str
    reason: str
    packed_bytes: int


class FusedModule(Wrapper):
    """A wrapper that computes its original's result with fused ops wherever that is proved equal.

    Subclasses set `kind` and write `_compose` and `_out_sizes` in terms of their units.
    """

    kind = ""
    # "preserve": contiguous, unless x is channels_last; "contiguous": that, whatever x is.
    output_format = "channels_last"
    exact_nonfinite = False  # True: no Winograd, which spreads NaN and Inf over a tile
    adds_shortcut = False  # True: the last unit adds one before its activation

    def __init__(
        self, original: nn.Module, units: tuple[ConvUnit, ...], links: tuple[Link, ...]
    ) -> None:
        super().__init__(original)
        self.__dict__["_units"] = units
        self.__dict__["_links"] = links
        self.__dict__["_cache"] = PackCache()
        self.join_chain(None)

    # -- the parts that differ ------------------------------------------------------------------

    @property
    def _error_name(self) -> str:
        """What error messages call the module."""
        return type(self).__name__

    def _compose(self, x: Tensor, run: Run) -> Tensor:
        """The module's output from x (N, C, H, W) with run(i, x, residual) for unit i."""
        raise NotImplementedError

    def _out_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of each unit's output for an input of `size`."""
        raise NotImplementedError

    def _out_size(self, unit: ConvUnit, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of one unit's output for its input of `size`."""
        return packing.out_size(self._error_name, unit.conv, size)

    def _run_original(self, x: Tensor) -> Tensor:
        original = self.original()
        patched = original.__dict__.get("forward")
        if patched is not None and patched is self.__dict__.get("forward"):
            # unfuse took it along, and it calls this module's own.
            return type(original).forward(original, x)
        return original(x)

    def _refuse_edited(self) -> None:
        """Raises NoMatch where edits since fusing left tensors that do not belong together."""
        for unit in self._units:
            refuse_edited(unit)
        refuse_mixture(self._units)

    def _run_at_once(self, x: Tensor, dtype: torch.dtype, packed: Packing) -> Tensor | None:
        """What _compose would return, by one op for all units; None where there is none."""
        return None

    def _at_once(self, size: tuple[int, ...], packed: Packing) -> packing.AtOnce | None:
        """The arguments of one op for all units for an image of `size`; None if there is none."""
        return None

    def _launches(self, x: Tensor, packed: Packing) -> Launch | None:
        """What _compose would return for inputs like x on a GPU, prepared; None if it cannot be."""
        return None

    def _structure_facts(self) -> list[guard.Fact]:
        """What _why_changed looks at, apart from hooks on all modules."""
        facts = [guard.item_is(self.__dict__, "_attribute_set", None)]
        for link in self._links:
            facts += facts_of(link)
        return facts

    # -- forward ----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """x: (N, C, H, W) or (C, H, W), under the name that the original's forward gives it.

        Raises ValueError or TypeError if x does not fit.
        """
        x = args[0] if len(args) == 1 and not kwargs else self._input(args, kwargs)
        if not torch.compiler.is_compiling() and type(x) is Tensor:
            y = self._served(x)
            if y is not None:
                return y
        if isinstance(x, fx.Proxy):
            return self.recorded(x)
        return self.chain_formatted(x, self._forward(x))

    def _served(self, x: Tensor) -> Tensor | None:
        """The output, where earlier calls left behind what gives it at once; else None."""
        if passes_on(self, x):
            return x
        chain = self._chain()
        y = None if chain is None else chain.computed(self._chain_start, x)
        if y is not None:
            return y
        serves = self._cache.ready(x.shape)
        y = serves(x) if serves is not None else None
        return None if y is None else self.chain_formatted(x, y)

    def _forward(self, x: Any) -> Tensor:
        """forward with every check; leaves behind what serves the next such call."""
        if self._why_changed() is not None:
            return self._run_original(x)
        self._check_input(x)
        if self._why_eager_now(x) is not None:
            return self._run_original(x)
        return self._compute(x)

    def chain_formatted(self, x: Tensor, y: Tensor) -> Tensor:
        """y, which is channels_last, in the output format."""
        if self.output_format == "contiguous" or (
            self.output_format == "preserve" and not _is_channels_last(x)
        ):
            return y.contiguous()
        return y

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first argument; that the original uses no other was proved when it was fused."""
        try:
            bound = inspect.signature(self.original().forward).bind(*args, **kwargs)
        except TypeError as error:
            takes = ", ".join(inspect.signature(self.original().forward).parameters)
            raise TypeError(
                f"{self._error_name}: arguments must fit forward({takes}): {error}"
            ) from None
        return next(iter(bound.arguments.values()), None)

    def _check_input(self, x: Any) -> None:
        op, conv = self._error_name, self._units[0].conv
        check.image(op, "x", x)
        weight = conv._parameters.get("weight")
        if weight is None or weight.dim() != 4:
            return  # _why_edited tells
        channels = weight.shape[1] * conv.groups
        if x.shape[-3] != channels:
            raise ValueError(
                f"{op}: x must have {channels} channels, got shape {check.shape_of(x)}"
            )
        if x.device != weight.device:
            raise ValueError(
                f"{op}: x must be on {weight.device}, where the weights are, got {x.device}"
            )
        if x.dtype != weight.dtype and not is_autocast_on(x.device):
            raise TypeError(
                f"{op}: x must be {check.dtype_name(weight.dtype)}, as the weights are, "
                f"got {check.dtype_name(x.dtype)}"
            )

    def _why_eager(self) -> str | None:
        """Why the next call runs the original module, or None."""
        return self._why_changed() or self._why_eager_now() or self._why_edited()

    def _why_edited(self) -> str | None:
        """Why tensors or settings no longer belong together, after edits, or None."""
        try:
            self._refuse_edited()
        except NoMatch as reason:
            return str(reason)
        return None

    def _why_changed(self) -> str | None:
        """What was done to the module since it was fused that fusing cannot follow, or None."""
        if has_global_hooks():
            return "hooks on all modules are set"
        if self._attribute_set is not None:
            return f"{self._attribute_set} was set"
        for link in self._links:
            reason = changed(link)
            if reason is not None:
                return reason
        return None

    def _why_eager_now(self, x: Tensor | None = None) -> str | None:
        """What in the module's mode or in this input asks for the original module, or None."""
        if self.training:
            return "training"
        for unit in self._units:
            weight = unit.conv._parameters.get("weight")
            if weight is None or weight.dim() != 4:
                return f"{unit.conv_name}.weight has no four dimensions"
            if unit.conv.padding_mode != "zeros":
                return f"{unit.conv_name} pads with {unit.conv.padding_mode!r}"
            bn = unit.bn
            if bn is not None and (bn.training or bn._buffers.get("running_mean") is None):
                return f"{unit.bn_name} uses batch statistics"
        if x is None:
            return None
        if is_exported_to_onnx():
            return "torch.onnx.export is at work, which knows PyTorch's operations only"
        if torch.compiler.is_compiling():
            return None
        if x.is_meta:
            return "the input has a shape only"
        if type(x) is not Tensor and not isinstance(x, nn.Parameter):
            return f"the input is a {type(x).__name__}"
        if is_transformed():
            kind = "forward-mode differentiation" if is_dual() else "a function transform"
            return f"{kind} is at work"
        if torch._C._get_tracing_state() is not None:
            return "torch.jit.trace is at work"
        return None

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        if x.dtype != torch.float64 and is_autocast_on(x.device):
            return torch.get_autocast_dtype(x.device.type)
        return self._units[0].conv.weight.dtype

    def _compute(self, x: Tensor) -> Tensor:
        dtype = self._compute_dtype(x)
        compiling = torch.compiler.is_compiling()
        packed = None if compiling else self._pack(x, dtype)
        if packed is None and not compiling:
            return self._run_original(x)  # which says what does not fit
        if self._needs_grad(x):
            runner = (
                _unit_runs.differentiable_in_graph(self._units, dtype)
                if compiling
                else _unit_runs.differentiable(self._units, dtype, packed.units)
            )
        elif compiling:
            batch = x.shape[0] if x.dim() == 4 and select.is_static(x.shape[0]) else 1
            runner = _unit_runs.in_graph(self._units, dtype, self._choose_all(x, dtype, batch))
        else:
            self._make_ready(x, dtype, packed)
            y = self._run_at_once(x, dtype, packed)
            if y is not None:
                return y
            runner = _unit_runs.packed(packed.units)

        def run(i: int, x: Tensor, residual: Tensor | None) -> Tensor:
            # Under autocast the input and an identity shortcut come in another dtype.
            return runner(i, x.to(dtype), residual if residual is None else residual.to(dtype))

        return self._compose(x, run)

    def _needs_grad(self, x: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        # Gradients may be enabled in inference mode, where nothing keeps what they need; dynamo
        # cannot ask.
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            return False
        # Not self.parameters(): a site's BN is no child of the module that computes it.
        return x.requires_grad or any(
            t.requires_grad for unit in self._units for t in tensors(unit)
        )

    def conv_shapes(self, x: Tensor, dtype: torch.dtype, batch: int = 1) -> list[select.ConvShape]:
        """Each unit's convolution for `batch` images of the size of the module's input x."""
        sizes = self._out_sizes((x.shape[-2], x.shape[-1]))
        return [
            packing.conv_shape(unit.conv, dtype, size, batch)
            for unit, size in zip(self._units, sizes, strict=True)
        ]

    def _choose_all(self, x: Tensor, dtype: torch.dtype, batch: int) -> tuple[select.Choice, ...]:
        for watcher in watchers:
            watcher(self, x, dtype)
        return tuple(
            [
                select.choose(shape, exact_nonfinite=self.exact_nonfinite)
                for shape in self.conv_shapes(x, dtype, batch)
            ]
        )

    def _pack(self, x: Tensor, dtype: torch.dtype) -> Packing | None:
        """The packed weights for calls like this one; None if _why_edited."""

        def choose_all() -> tuple[select.Choice, ...]:
            self._refuse_edited()
            return self._choose_all(x, dtype, batch)

        batch = self._cache.largest_batch(x.shape[0] if x.dim() == 4 else 1)
        context = (x.shape[-2:], batch, dtype, self.exact_nonfinite, select.state())
        try:
            return self._cache.get(self._units, dtype, context, choose_all)
        except NoMatch:
            return None

    def _make_ready(self, x: Tensor, dtype: torch.dtype, packed: Packing) -> None:
        """Remembers how to serve further inputs like x, where one op can and all can be watched."""
        if x.dtype != dtype or not can_be_ready(x):
            return
        facts = self._facts(packed)
        ready = None if facts is None else self._ready(x, facts, packed)
        if ready is None:
            return
        if len(packed.ready) >= _MOST_READY:
            packed.ready.clear()
        packed.ready[x.shape] = ready

    def _ready(
        self, x: Tensor, facts: list[guard.Fact], packed: Packing
    ) -> Ready | ReadyOnGpu | None:
        if takes_launches(x):
            run = self._launches(x, packed)
            return None if run is None else ReadyOnGpu(x, facts, run, packed.readers)
        arguments = self._at_once(tuple(x.shape[-2:]), packed)
        return None if arguments is None else Ready.of(x, facts, arguments)

    # -- what a chain asks; a block's own attributes must not have these names --------------------

    def chain_ready(self, shape: torch.Size) -> Ready | ReadyOnGpu | None:
        """What may serve an input of that shape at once."""
        return self._cache.ready(shape)

    def join_chain(self, chain: Chain | None, at: int = 0) -> None:
        """Has this module ask the chain whose stage `at` it is, as long as that lives."""
        self.__dict__["_chain"] = _nothing if chain is None else weakref.ref(chain)
        self.__dict__["_chain_start"] = at

    def chain_packing(self) -> Packing | None:
        """What is packed now."""
        return self._cache.packing

    def chain_facts(self) -> list[guard.Fact]:
        """What must hold for what is `ready` to serve as a part of a chain's."""
        return [*(self.facts() or ()), *self._cache.facts()]

    def chain_output_shape(self, shape: torch.Size) -> torch.Size:
        """Of the output for an input of `shape`, (N, C, H, W) or (C, H, W), that was served."""
        last = self._units[-1]
        size = self._out_sizes((shape[-2], shape[-1]))[-1]
        if last.max_pool:
            size = tuple(map(check.pooled_size, size))
        return torch.Size((*shape[:-3], last.conv.weight.shape[0], *size))

    def facts(self) -> list[guard.Fact] | None:
        """What must hold for the last call's packed weights to serve the next; None where more than
        facts must be looked at, or nothing is packed."""
        packed = self._cache.packing
        return None if packed is None else self._facts(packed)

    def _facts(self, packed: Packing) -> list[guard.Fact] | None:
        facts = packed.stamp.facts()
        device = self._units[0].conv.weight.device.type
        if facts is None:
            return None
        facts += [*GLOBAL_HOOK_FACTS, *self._structure_facts(), *select.facts(device)]
        facts += [guard.attribute(self, "training"), guard.attribute(self, "exact_nonfinite")]
        for unit in self._units:
            facts.append(guard.attribute(unit.conv, "padding_mode"))
            if unit.bn is not None:
                facts.append(guard.attribute(unit.bn, "training"))
        return facts

    # -- state ------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> FusedModule:
        self._cache.doubted = True
        return super().train(mode)

    def drop_packed(self) -> None:
        """Forgets the packed weights; the next call packs again."""
        self._cache.drop()
        chain = self._chain()
        if chain is not None:
            chain.drop()

    def status(self) -> Status:
        """Whether the next call runs fused, on what, and why (not)."""
        held = self._cache.held()
        size = sum(unit.nbytes for unit in held)
        reason = self._why_eager()
        if reason is not None:
            return Status(False, "eager", reason, size)
        if not held:
            return Status(True, NOT_RUN_YET, "", 0)
        names = [unit.conv_name for unit in self._units]
        backends = {unit.choice.backend for unit in held}
        if len(backends) == 1:
            backend = backends.pop()
        else:
            backend = ", ".join(
                f"{n}: {u.choice.backend}" for n, u in zip(names, held, strict=True)
            )
        reasons = dict.fromkeys(unit.reason for unit in held)
        return Status(True, backend, "; ".join(reasons), size)

    def __getstate__(self) -> dict[str, Any]:
        """Shallow copies, too, have a cache of their own: their flags are."""
        return self.__dict__ | {"_cache": PackCache(), "_chain": _nothing}

    def extra_repr(self) -> str:
        return f"kind={self.kind}, original={type(self.__dict__['_original']).__name__}"


def _nothing() -> None:
    """In the place of a weak reference."""


_MOST_READY = 16  # shapes of inputs


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() != 4:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
