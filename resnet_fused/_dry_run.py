"""Confirms a recipe on real tensor objects: a symbolic trace cannot answer isinstance() truly.

Block and recipe both run on meta tensors: shapes only, no memory, no arithmetic. What they did must
be the same expression, operation by operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ._errors import one_line
from ._trace import shadow
from .conv_shape import as_pair
from .recipe import BlockRecipe, ConvUnit, NoMatch

# Larger than any receptive field; a power of two, so that strides fit main path and shortcut alike.
_SIDE = 1024


def confirm(block: nn.Module, recipe: BlockRecipe) -> None:
    """Raises NoMatch unless block(x) in eval mode runs what the recipe says and nothing else."""
    conv = recipe.main[0].conv
    with torch.inference_mode(False), torch.no_grad():
        copied = shadow(block).eval()
        _to_meta(copied)
        x = torch.empty(1, conv.in_channels, _SIDE, _SIDE, dtype=conv.weight.dtype, device="meta")
        try:
            with _Log(x) as theirs:
                returned = copied(x)
        except NoMatch:
            raise
        except Exception as error:
            raise NoMatch(f"does not run ({one_line(error)})") from error
        with _Log(x) as ours:
            expected = _run(recipe, copied, x)
    asked = theirs.queries - ours.queries
    if asked:
        raise NoMatch(f"forward asks for the {next(iter(asked))} of a tensor, and may branch on it")
    if theirs.ops != ours.ops or theirs.expression(returned) != ours.expression(expected):
        raise NoMatch("forward does something else with tensors than what its trace shows")


def _run(recipe: BlockRecipe, block: nn.Module, x: Tensor) -> Tensor:
    y = x
    for unit in recipe.main[:-1]:
        y = _unit(unit, block, y)
        y = F.relu(y) if unit.act == "relu" else y
    y = _unit(recipe.main[-1], block, y)
    skip = block.get_submodule(recipe.avg_pool_name)(x) if recipe.avg_pool_name else x
    if recipe.shortcut:
        skip = _unit(recipe.shortcut, block, skip)
    y = y + skip
    return F.relu(y) if recipe.main[-1].act == "relu" else y


def _unit(unit: ConvUnit, block: nn.Module, x: Tensor) -> Tensor:
    y = block.get_submodule(unit.conv_name)(x)
    return block.get_submodule(unit.bn_name)(y) if unit.bn_name else y


def _to_meta(module: nn.Module) -> None:
    """Replaces every tensor of `module`, which is ours, by one without storage."""
    meta: dict[int, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in meta:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            parameter = isinstance(tensor, nn.Parameter)
            meta[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
        return meta[id(tensor)]

    for m in module.modules():
        for own in (m._parameters, m._buffers):
            own.update({key: twin(t) for key, t in own.items() if t is not None})


class _Log(TorchFunctionMode):
    """What was computed, as expressions; an in-place operation counts as its out-of-place twin."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.queries: Counter[str] = Counter()  # what was asked of tensors: shapes, flags
        self._alive: list[Any] = [x]
        self._made: dict[int, Any] = {id(x): "x"}

    def expression(self, value: Any) -> Any:
        """What a tensor was computed by, a tuple for a container, else the value's repr."""
        if isinstance(value, (tuple, list)):
            return tuple(self.expression(item) for item in value)
        return self._made.get(id(value), id(value)) if isinstance(value, Tensor) else repr(value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, run = _BY_HAND.get(func, (getattr(func, "__name__", repr(func)), func))
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [t._version for t in operands]
        expression = hash((name, *self._operands(name, args, kwargs)))
        out = run(*args, **kwargs)
        results = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        unchanged = {id(t) for t, v in zip(operands, versions, strict=True) if t._version == v}
        if not results:
            owner = getattr(func, "__self__", None)  # x.shape is the method of a descriptor
            self.queries[getattr(owner, "__name__", name)] += 1
        # Neither a query nor an operation that hands its operand on.
        elif not {id(t) for t in results} <= unchanged:
            self.ops[name] += 1
            for index, tensor in enumerate(results):
                self._alive.append(tensor)
                self._made[id(tensor)] = (expression, index)
        return out

    def _operands(self, name: str, args: Any, kwargs: Any) -> list[Any]:
        if name == "relu":  # the rest only says whether in place
            return [self.expression((*args, *kwargs.values())[0])]
        if name == "add" and kwargs.get("alpha", 1) == 1:
            summands = (*args, *(value for key, value in kwargs.items() if key != "alpha"))
            return sorted((self.expression(s) for s in summands), key=repr)
        named = [(key, self.expression(value)) for key, value in sorted(kwargs.items())]
        return [self.expression(a) for a in args] + named


# Shapes by hand: PyTorch's own meta versions of these are Python that imports sympy and more, which
# costs the first call a second.


def _conv2d(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    stride, dilation = as_pair(stride), as_pair(dilation)
    padding = padding if isinstance(padding, str) else as_pair(padding)
    channels = weight.shape[1] * groups
    if x.shape[1] != channels:
        raise ValueError(f"a convolution of {channels} channels gets {x.shape[1]}")
    sides = []
    for i in range(2):
        extent = dilation[i] * (weight.shape[2 + i] - 1)
        if isinstance(padding, str):
            around = extent if padding == "same" else 0
        else:
            around = 2 * padding[i]
        sides.append((x.shape[2 + i] + around - extent - 1) // stride[i] + 1)
    return x.new_empty((x.shape[0], weight.shape[0], *sides))


def _fresh(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return x.new_empty(x.shape)


def _written(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    torch.autograd.graph.increment_version(x)
    return x


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _written(input) if inplace else _fresh(input)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Tensor:
    _check_summands(input, other)
    return _fresh(input if isinstance(input, Tensor) else other)


def _add_(input: Tensor, other: Any, *, alpha: Any = 1) -> Tensor:
    _check_summands(input, other)
    return _written(input)


def _check_summands(a: Any, b: Any) -> None:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape != b.shape:
        raise NoMatch(
            f"adds {tuple(b.shape[1:])} to {tuple(a.shape[1:])}, which broadcasts or fails"
        )


_BY_HAND: dict[Any, tuple[str, Callable[..., Tensor]]] = {
    F.conv2d: ("conv2d", _conv2d),
    F.batch_norm: ("batch_norm", _fresh),
    F.relu: ("relu", _relu),
    **dict.fromkeys((torch.relu, Tensor.relu), ("relu", _fresh)),
    **dict.fromkeys((torch.relu_, Tensor.relu_), ("relu", _written)),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), ("add", _add)),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), ("add", _add_)),
}
