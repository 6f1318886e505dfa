"""Records what a module's forward does to its input, by torch.fx, without touching the module.

The recording runs on a copy that shares only the tensors, so that a forward which stores things
on itself, flips a flag or fails half way leaves the user's module as it was.
"""

from __future__ import annotations

import builtins
import copy
import dis
import operator
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ._caller import call_paths, codes
from ._errors import kind_and_line
from ._reads import log_reads
from .recipe import NoMatch

# torch.fx patches nn.Module.__call__ for the whole process while it traces: one trace at a time,
# and modules that other threads run meanwhile pass through (see Recorder.call_module).
_LOCK = threading.RLock()

HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


@dataclass(frozen=True)
class Mode:
    training: bool
    grad: bool


EVAL, EVAL_GRAD, TRAIN = Mode(False, False), Mode(False, True), Mode(True, True)
MODES = (EVAL, EVAL_GRAD, TRAIN)


_READS_CLASS = {dis.opmap[name] for name in ("LOAD_ATTR", "MATCH_CLASS")}


class _Value(fx.Proxy):
    """fx's Proxy, except that `a += b` is recorded as what it is and that nothing passes unseen."""

    @property
    def __class__(self) -> type:
        """A tensor for Python code that reads it, as in a real call; isinstance: _found_as_tensors.

        For nobody else: torch's C++ asks, too, and would take the memory of this for a tensor's.
        """
        frame = sys._getframe(1)
        reads = frame.f_code.co_code[frame.f_lasti] in _READS_CLASS
        return Tensor if reads else type(self)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):  # as a tensor would, so that hasattr() answers truly
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise NoMatch(f"forward sets the attribute {name} of a tensor")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        raise NoMatch("forward branches on the shape of a tensor")


@contextmanager
def _found_as_tensors() -> Iterator[None]:
    """Within the block isinstance(), and so torch.is_tensor(), finds recorded values to be tensors;
    for the whole process, which else notices nothing."""
    real = builtins.isinstance

    def found(value: Any, kind: Any, /) -> bool:
        return real(value, kind) or (type(value) is _Value and issubclass(Tensor, kind))

    builtins.isinstance = found
    try:
        yield
    finally:
        builtins.isinstance = real


def _in_place(name: str) -> Callable[[_Value, Any], fx.Proxy]:
    target = getattr(operator, name)

    def record(self: _Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in [
    "add",
    "and",
    "floordiv",
    "lshift",
    "mod",
    "mul",
    "matmul",
    "or",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
]:
    setattr(_Value, f"__i{_name}__", _in_place(f"i{_name}"))


class _OnlyRecorded(TorchFunctionMode):
    """Refuses torch calls without a recorded value: random draws, branches on stored tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        # torch.no_grad() passes here too; each node's ambient tells of it.
        if func is torch._C._set_grad_enabled or any(isinstance(a, fx.Proxy) for a in leaves):
            return func(*args, **kwargs)
        raise NoMatch(f"forward computes {getattr(func, '__name__', func)} apart from its input")


class Recorder(fx.Tracer):
    """fx's Tracer with a given leaf rule; notes each node's gradient and autocast mode.

    And, for a layer, the call_path from each module whose forward is running, by that one's name,
    and what modules were called since the layer before.
    """

    proxy_buffer_attributes = True  # a branch on a buffer must fail, not be baked in

    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._is_leaf = is_leaf
        self.reads: dict[str, set[str]] = {}
        self.values: list[tuple[fx.Node, weakref.ref]] = []
        self._entered: list[str] = []
        self._forwards: frozenset[int] = frozenset()
        self._thread = threading.get_ident()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Value(node, self)
        self.values.append((node, weakref.ref(value)))
        return value

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["ambient"] = _ambient()
        if node.op == "placeholder":  # forward begins
            for names in self.reads.values():
                names.clear()
            kinds = {type(m) for m in self.submodule_paths if not self._is_leaf(m)}
            kinds.add(type(self.root))
            self._forwards = frozenset(code for kind in kinds for code in codes(kind.forward))
        if node.op == "call_module":
            paths = call_paths(self.root, self._forwards)
            node.meta["callers"] = {self.submodule_paths.get(m): path for m, path in paths}
            node.meta["entered"], self._entered = self._entered, []
        return node

    def create_arg(self, a: Any) -> Any:
        # Before fx takes the value for the tensor that it says it is.
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._is_leaf(m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        self._entered.append(self.path_of_module(m))
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            kind = type(mod).__name__
            raise NoMatch(f"forward calls a {kind} that is not one of its submodules") from None

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise NoMatch("forward branches on the values or the shape of a tensor")

    def iter(self, obj: fx.Proxy) -> Any:
        raise NoMatch("forward iterates over a tensor")


def _ambient() -> tuple[Any, ...]:
    autocast = tuple(
        (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
    )
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


def unit_leaf(module: nn.Module) -> bool:
    """Leaves of a block's trace: torch's own layers and what derives from convolutions or norms."""
    if isinstance(module, (_ConvNd, _NormBase)):
        return True
    own = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    return own and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def any_child(module: nn.Module) -> bool:
    """Leaves of a parent's trace: whatever it calls."""
    return True


def shadow(module: nn.Module, share_children: bool = False) -> nn.Module:
    """A deep copy that shares every tensor with `module` and has no forward or backward hooks.

    share_children: shares the submodules too, where none of them will run.
    """
    memo: dict[int, Any] = {}
    for m in module.modules():
        if share_children and m is not module:
            memo[id(m)] = m
            continue
        for value in (*m._parameters.values(), *m._buffers.values(), *m.__dict__.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:
        raise NoMatch(f"cannot be copied for tracing ({kind_and_line(error)})") from error
    for m in [copied] if share_children else copied.modules():
        for hooks in HOOKS:
            m.__dict__[hooks].clear()
    return copied


def record(
    module: nn.Module, modes: Iterable[Mode], is_leaf: Callable[[nn.Module], bool]
) -> list[fx.Graph]:
    """The graphs of module.forward in these modes.

    Raises NoMatch with the reason when forward cannot be traced, draws random numbers, or changes
    the module's attributes. Each node's meta["ambient"] tells the gradient and autocast state that
    it ran under; that of the placeholders is the one that forward was entered with.
    """
    copied = shadow(module, share_children=is_leaf is any_child)
    own = [copied] if is_leaf is any_child else list(copied.modules())
    graphs = []
    for mode in modes:
        try:
            graphs.append(_record(copied, own, mode, Recorder(is_leaf)))
        except NoMatch as reason:
            raise NoMatch(f"{reason}{' in train()' if mode.training else ''}") from reason
    return graphs


_LISTS = (nn.ModuleList, nn.ModuleDict)  # nobody calls them


def record_reads(
    module: nn.Module, mode: Mode, is_leaf: Callable[[nn.Module], bool]
) -> tuple[fx.Graph, dict[str, set[str]]]:
    """As record, in one mode; and the names of attributes that the forwards of modules read which
    are no leaves, by the names of those modules; nothing of PyTorch's own, which hold modules only.

    meta["kept"] of a node: whether forward has put its value where it outlives the call.
    """
    copied = shadow(module)
    recorder = Recorder(is_leaf)
    names: dict[str, set[str]] = {}
    for name, m in copied.named_modules():
        if m is copied or not is_leaf(m) or isinstance(m, _LISTS):
            own = type(m).__module__.startswith("torch.nn.")
            names[name] = set() if own else log_reads(m)
    recorder.reads = names
    graph = _record(copied, list(copied.modules()), mode, recorder)
    for node, value in recorder.values:
        node.meta["kept"] = value() is not None
    return graph, names


def _record(copied: nn.Module, own: list[nn.Module], mode: Mode, recorder: Recorder) -> fx.Graph:
    for m in own:
        m.__dict__["training"] = mode.training
    before = [_freeze(vars(m)) for m in own]
    dice = _dice()
    try:
        with _LOCK, torch.set_grad_enabled(mode.grad), _OnlyRecorded(), _found_as_tensors():
            graph = recorder.trace(copied)
    except NoMatch:
        raise
    except Exception as error:
        raise NoMatch(f"forward cannot be traced ({kind_and_line(error)})") from error
    finally:
        drew = _dice() != dice
        _restore(dice)
    if drew:
        raise NoMatch("forward draws random numbers")
    for m, (old, _) in zip(own, before, strict=True):
        changed = {key for key, _ in old ^ _freeze(vars(m))[0]}
        if changed:
            raise NoMatch(f"forward changes the attribute {sorted(changed)[0]}")
    return graph


def record_all(module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> fx.Graph:
    """The one graph that forward has in every mode; NoMatch where the modes differ."""
    graphs = record(module, MODES, is_leaf)
    shapes = [_canonical(graph) for graph in graphs]
    if shapes[0] != shapes[1]:
        raise NoMatch("forward depends on whether gradients are on")
    if shapes[1] != shapes[2]:
        raise NoMatch("forward differs between train() and eval()")
    for graph in graphs:
        entered = next(iter(graph.nodes)).meta["ambient"]
        if any(node.meta["ambient"] != entered for node in graph.nodes):
            raise NoMatch("forward changes the gradient or autocast mode")
    return graphs[0]


def _canonical(graph: fx.Graph) -> list[tuple[Any, ...]]:
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    return [
        (node.op, node.target, repr(fx.node.map_arg((node.args, node.kwargs), number.__getitem__)))
        for node in graph.nodes
    ]


_LONG = 10_000  # containers of data, not of settings


def _freeze(value: Any, depth: int = 4) -> tuple[frozenset[tuple[str, Any]], Any]:
    """What an attribute dict holds, by identity, down through containers; what keeps it alive."""
    alive: list[Any] = []

    def visit(item: Any, depth: int) -> Any:
        alive.append(item)
        containers = (dict, list, tuple, set, frozenset)
        if not depth or not isinstance(item, containers) or len(item) > _LONG:
            return id(item)
        if isinstance(item, dict):
            return tuple((visit(key, 1), visit(child, depth - 1)) for key, child in item.items())
        return tuple(visit(child, depth - 1) for child in item)

    return frozenset((str(key), visit(item, depth)) for key, item in value.items()), alive


def _dice() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy else None
    return random.getstate(), state and (state[0], state[1].tobytes(), *state[2:])


def _restore(dice: tuple[Any, ...]) -> None:
    random.setstate(dice[0])
    if dice[1]:
        numpy = sys.modules["numpy"]
        name, key, *rest = dice[1]
        numpy.random.set_state((name, numpy.frombuffer(key, dtype=numpy.uint32), *rest))
