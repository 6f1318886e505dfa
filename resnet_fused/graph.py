"""graph: a model replayed as a CUDA graph, for latency where launches take longer than kernels."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import check, guard
from ._call import check_example
from ._errors import one_line
from ._recording import Recording
from ._recording_facts import NotRecordable, facts_of_fused, facts_of_modules, read_by_kernels
from ._streams import Readers


class Graphed(nn.Module):
    """Calls `model`, through a CUDA graph for inputs like the example's.

    model: the model itself, whose state_dict keys get the prefix "model.". reason: None after a
    call that was replayed, else why the last call (at first: the next) runs the model as it is.

    A change of the model's modules, tensors, modes or hooks is seen at the next call, which records
    again; other attributes that a forward may read, and what a fused model does not see on a GPU
    (writes through `.data`), are not.
    Outputs are the caller's: the next call does not overwrite them.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        leaves, self._spec = pytree.tree_flatten(_arguments(example))
        self._like = [_Like(leaf) for leaf in leaves]
        self._recorded = _NOTHING
        self.reason: str | None = _why_not_now(_tensors(leaves))
        if self.reason is None:
            self.reason = self._current(leaves).why_not

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.model(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        reason = self._why_other(leaves, spec) or _why_not_now(_tensors(leaves))
        if reason is None:
            recorded = self._current(leaves)
            reason = recorded.why_not
            if reason is None and torch.is_grad_enabled() and recorded.needs_grad():
                reason = _GRADIENTS
        self.reason = reason
        return recorded.replay(leaves) if reason is None else self.model(*args, **kwargs)

    def _why_other(self, leaves: list[Any], spec: Any) -> str | None:
        """Why the arguments are not like the example's, or None."""
        if spec != self._spec:
            return "the arguments are other than the example's"
        for like, leaf in zip(self._like, leaves, strict=True):
            reason = like.why_not(leaf)
            if reason:
                return reason
        return None

    def _current(self, leaves: list[Any]) -> _Outcome:
        """What serves the model as it is now; made anew where the last one does not."""
        recorded = self._recorded  # once: another thread may put its own in its place
        if recorded.holds():
            return recorded
        with _recording:
            if not self._recorded.holds():
                self._recorded = _NOTHING  # whose memory the new one may use
                self._recorded = self._look_again(leaves)
            return self._recorded

    def _look_again(self, leaves: list[Any]) -> _Outcome:
        reason = _why_never(self.model, _tensors(leaves))
        if reason is None and any(module.training for module in self.model.modules()):
            reason = "the model is in training mode"
        return _Recorded(self.model, leaves, self._spec) if reason is None else _Outcome(reason)

    def __getstate__(self) -> dict[str, Any]:
        # Copies record at their first call.
        spec = pytree.treespec_dumps(self._spec)
        return self.__dict__ | {"_recorded": _NOTHING, "_spec": spec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._spec = pytree.treespec_loads(self._spec)

    def extra_repr(self) -> str:
        return "replayed as a CUDA graph" if self.reason is None else f"eager: {self.reason}"


def graph(model: nn.Module, example: Any) -> Graphed:
    """A module that computes what `model` does, replaying a CUDA graph for inputs like `example`.

    For small batches, whose kernels are shorter than it takes to launch them one by one. The model
    must be in eval mode, on one GPU, and must not look at values on the CPU.

    example: a tensor, a tuple of arguments or a dict of keyword arguments. Inputs of another shape,
    dtype or device, calls with gradients and models in training mode run the model as it is;
    `.reason` of the result says why, and None where the last call was replayed. On the CPU every
    call does.
    Raises TypeError for arguments of another kind.
    """
    check.module("graph", "model", model)
    check_example("graph", example, "example")
    with torch.no_grad():
        return Graphed(model, example)


_GRADIENTS = "gradients are asked for"
_recording = threading.RLock()  # one at a time; a model may hold graphed ones
_TENSOR = object()  # in the place of one among the arguments


class _Like:
    """One leaf of the example's arguments."""

    def __init__(self, leaf: Any) -> None:
        self.is_tensor = isinstance(leaf, Tensor)
        self.expected = _look(leaf) if self.is_tensor else leaf

    def why_not(self, leaf: Any) -> str | None:
        if not self.is_tensor:
            if type(leaf) is type(self.expected) and leaf == self.expected:
                return None
            return f"an argument is {leaf!r:.40}, not {self.expected!r:.40}"
        if type(leaf) not in (Tensor, nn.Parameter):
            return f"the input is a {type(leaf).__name__}"
        if _look(leaf) == self.expected:
            return None
        return f"the input is {_text(_look(leaf))}, not {_text(self.expected)}"


def _look(x: Tensor) -> tuple[Any, ...]:
    return (tuple(x.shape), x.dtype, x.device)


def _text(look: tuple[Any, ...]) -> str:
    shape, dtype, device = look
    return f"{check.dtype_name(dtype)} {shape} on {device}"


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    return ((), dict(example)) if hasattr(example, "keys") else (tuple(example), {})


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _why_never(model: nn.Module, inputs: Sequence[Tensor]) -> str | None:
    if not inputs:
        return "it needs a tensor among the arguments"
    devices = sorted({str(t.device) for t in (*inputs, *model.parameters(), *model.buffers())})
    if len(devices) != 1:
        return f"it needs one device, got {', '.join(devices)}"
    if not devices[0].startswith("cuda"):
        return f"CUDA graphs need a GPU, the model is on {devices[0]}"
    return None


def _why_not_now(inputs: Sequence[Tensor]) -> str | None:
    """What of the mode, here and now, a graph does not follow."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _GRADIENTS
    if inputs and inputs[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "another graph is being recorded"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a function transform is at work"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a mode is at work that sees every operation"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is at work"
    return None


class _Outcome:
    """What serves calls: here nothing, and why."""

    def __init__(self, why_not: str | None) -> None:
        self.why_not = why_not

    def holds(self) -> bool:
        return False

    def needs_grad(self) -> bool:
        return False

    def replay(self, leaves: list[Any]) -> Any:
        raise AssertionError(self.why_not)

    def __reduce__(self) -> str:
        return "_NOTHING"


_NOTHING = _Outcome("nothing is recorded")  # before the first


class _Recorded(_Outcome):
    """A model's recording, or why it could not be recorded, for as long as it stays as it is."""

    def __init__(self, model: nn.Module, leaves: list[Any], spec: Any) -> None:
        super().__init__(None)
        self._model, self._spec = model, spec
        self._leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._parameters = list(model.parameters())
        facts = []
        try:
            facts = facts_of_modules(model)
            if guard.watch([]) is None:
                raise NotRecordable(
                    "without the extension _guard no change of the model would be seen"
                )
            with torch.inference_mode(False), torch.no_grad():
                self._recording = Recording(self._run, _tensors(leaves))
            facts += facts_of_fused(model)
            self._readers = Readers(read_by_kernels(model))  # kept alive, too
        except (RuntimeError, NotRecordable) as error:
            self.why_not = f"it cannot be recorded: {one_line(error, None)}"
        # With no facts, for hooks that Python alone sees, the next call looks again.
        self._holds = guard.watch(facts) if facts else None

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        values = [next(given) if leaf is _TENSOR else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(values, self._spec)
        # Autocast's cache would hold casts that a recording must not share with what comes before.
        autocast = torch.autocast(
            "cuda",
            dtype=torch.get_autocast_dtype("cuda"),
            enabled=torch.is_autocast_enabled("cuda"),
            cache_enabled=False,
        )
        with autocast:
            result, self._out_spec = pytree.tree_flatten(self._model(*args, **kwargs))
        if not result or not all(isinstance(y, Tensor) for y in result):
            raise NotRecordable("the model's output must be tensors")
        return result

    def holds(self) -> bool:
        return self._holds is not None and self._holds()

    def needs_grad(self) -> bool:
        return any(p.requires_grad for p in self._parameters)

    def replay(self, leaves: list[Any]) -> Any:
        self._readers.add_current()
        return pytree.tree_unflatten(self._recording.replay(_tensors(leaves)), self._out_spec)
