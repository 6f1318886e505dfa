"""From a traced graph to steps: what each value is computed from, aliases and writes resolved."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from .recipe import NoMatch

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_IN_PLACE = {operator.iadd, torch.relu_, "add_", "relu_"}
_ACTIVATIONS = {
    f"{name}{suffix}"
    for name in (
        *("celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"),
        *("logsigmoid", "mish", "prelu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus"),
        *("softsign", "tanh", "tanhshrink", "threshold"),
    )
    for suffix in ("", "_")
}


@dataclass(eq=False)
class Step:
    """One operation: kind is input, argument, conv, norm, relu, act, pool, add, dropout, identity
    or other."""

    kind: str
    label: str  # how a reason names it
    inputs: list[Step] = field(default_factory=list)
    users: list[Step] = field(default_factory=list)
    module: nn.Module | None = None
    name: str | None = None  # the module's path below the traced one
    calls: int = 1  # how often the graph calls that module


def resolve(graph: fx.Graph, root: nn.Module) -> tuple[Step, list[Step]]:
    """The output of a traced module with one tensor input, and every step on the way to it.

    root is the module that `graph` was traced from: its submodules are those that the steps name.
    An in-place operation becomes a step of its own, and whoever reads the value afterwards reads
    that step. Raises NoMatch where the input is written to, where a second argument is used and for
    any output but one tensor.
    """
    source = Step("input", "the input")
    value: dict[fx.Node, Step] = {}
    steps: list[Step] = []
    calls = Counter(id(root.get_submodule(n.target)) for n in graph.nodes if n.op == "call_module")
    for node in graph.nodes:
        if node.op == "placeholder":
            extra = Step("argument", f"the argument {node.target.lstrip('*')}")
            value[node] = extra if value else source
        elif node.op == "output":
            return _returned(node, value), steps
        elif node.op == "get_attr":
            if node.users:
                raise NoMatch(f"forward uses {node.target} directly")
        else:
            step = _step(node, root)
            if step.module is not None:
                step.calls = calls[id(step.module)]
            operands = [value[n] for n in node.all_input_nodes]
            for operand in operands:
                if operand.kind == "argument":
                    raise NoMatch(f"forward uses {operand.label}")
            if _is_alias(step):
                value[node] = operands[0]
                continue
            step.inputs = operands if step.kind != "add" else [value[n] for n in _operands(node)]
            if _writes(node, step):
                _overwrite(value, step.inputs[0], step)
            for operand in step.inputs:
                operand.users.append(step)
            value[node] = step
            steps.append(step)
    raise NoMatch("forward has no output")


def skips(graph: fx.Graph, root: nn.Module) -> int:
    """The most convolutions that one summand of an addition has passed and the other has not, or 0.

    Tells a residual block, fusable or not, from other modules.
    """
    passed: dict[fx.Node, frozenset[fx.Node]] = {}
    most = 0
    for node in graph.nodes:
        inputs = [passed[n] for n in node.all_input_nodes if n in passed]
        if node.op == "placeholder":
            passed[node] = frozenset()
        elif inputs:
            if node.target in _ADDS and len(inputs) == 2:
                most = max(most, len(inputs[0] - inputs[1]), len(inputs[1] - inputs[0]))
            conv = node.op == "call_module" and isinstance(root.get_submodule(node.target), _ConvNd)
            passed[node] = frozenset().union(*inputs, [node] if conv else [])
    return most


def _returned(node: fx.Node, value: dict[fx.Node, Step]) -> Step:
    (result,) = node.args
    if not isinstance(result, fx.Node):
        what = "nothing" if result is None else f"a {type(result).__name__}"
        raise NoMatch(f"forward returns {what}")
    return value[result]


def _step(node: fx.Node, root: nn.Module) -> Step:
    if node.op == "call_module":
        module = root.get_submodule(node.target)
        label = f"{type(module).__name__} ({node.target})"
        step = Step(_module_kind(module), label, module=module, name=node.target)
        if len(node.args) + len(node.kwargs) != 1 or len(node.all_input_nodes) != 1:
            raise NoMatch(f"unexpected arguments of {step.label}")
        return step
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if node.target in _ADDS:
        return Step("add", "addition")
    if node.target in _RELUS:
        return Step("relu", "relu")
    return Step("act" if name in _ACTIVATIONS else "other", name + _where(node))


def _module_kind(module: nn.Module) -> str:
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, _DropoutNd):
        return "dropout"
    exact = {nn.ReLU: "relu", nn.AvgPool2d: "pool", nn.Identity: "identity"}
    if type(module) in exact:
        return exact[type(module)]
    return "act" if type(module).__module__ == activation.__name__ else "other"


def _is_alias(step: Step) -> bool:
    return step.kind == "identity" or (step.kind == "dropout" and step.module.p == 0)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The two summands of an addition that adds two tensors and nothing else."""
    names = ("input", "other")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    alpha = given.pop("alpha", 1)
    if isinstance(alpha, fx.Node) or alpha != 1:
        raise NoMatch(f"the addition has alpha={alpha}")
    if len(node.args) > 2 or set(given) != set(names):
        raise NoMatch("the addition has unexpected arguments")
    if not all(isinstance(summand, fx.Node) for summand in given.values()):
        raise NoMatch("an addition adds a constant")
    return [given[name] for name in names]


def _writes(node: fx.Node, step: Step) -> bool:
    if step.kind not in ("add", "relu"):
        return False  # anything else ends the match, whatever it writes to
    if isinstance(step.module, nn.ReLU):
        return bool(step.module.inplace)
    if node.target is F.relu:
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("inplace", False)
        return given is not False
    return node.target in _IN_PLACE


def _overwrite(value: dict[fx.Node, Step], old: Step, new: Step) -> None:
    if old.kind == "input":
        raise NoMatch("forward changes its input in place")
    for node, step in value.items():
        if step is old:
            value[node] = new


def _where(node: fx.Node) -> str:
    """The child in which a node was recorded, if not in the traced module's own forward."""
    stack: Any = list(node.meta.get("nn_module_stack", {}).values())
    return f" in {stack[0][0]}" if stack else ""
