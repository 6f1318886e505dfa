"""What keeps a module from being fused although its dataflow fits. Each check raises NoMatch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from ._trace import HOOKS
from .conv_shape import as_pair
from .recipe import BlockRecipe, ConvUnit, NoMatch

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What a block's class may define anew of nn.Module's; anything else could make the block behave
# differently from the module that takes its place.
_MAY_OVERRIDE = {
    "__annotations__",
    "__constants__",
    "__dict__",
    "__dir__",
    "__doc__",
    "__firstlineno__",
    "__init__",
    "__module__",
    "__parameters__",
    "__repr__",
    "__static_attributes__",
    "__weakref__",
    "_get_name",
    "extra_repr",
    "forward",
}
_COPYING = {
    "__copy__",
    "__deepcopy__",
    "__getattribute__",
    "__getstate__",
    "__reduce__",
    "__reduce_ex__",
}


def refuse_block(block: nn.Module) -> None:
    """Everything about the block and its submodules that a trace cannot see."""
    for cls in type(block).__mro__:
        if cls is nn.Module:
            break
        overridden = (set(vars(cls)) & (set(vars(nn.Module)) | _COPYING)) - _MAY_OVERRIDE
        if overridden:
            raise NoMatch(f"its class overrides {sorted(overridden)[0]}")
    for name, module in block.named_modules():
        refuse_altered(module, name or "the block")


def refuse_altered(module: nn.Module, name: str) -> None:
    """Hooks, parametrizations, and methods replaced on the instance."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise NoMatch(f"{name} is a {type(module).__name__} that has not seen its shapes yet")
    if parametrize.is_parametrized(module):
        raise NoMatch(f"{name} is parametrized")
    for attribute, hook in HOOKS.items():
        if getattr(module, attribute):
            raise NoMatch(f"{name} has a {hook}")
        if getattr(torch_module, f"_global{attribute}"):
            raise NoMatch(f"a global {hook} is registered for all modules")
    if module.__dict__.get("_compiled_call_impl") is not None:
        raise NoMatch(f"{name} is compiled on its own")
    for attribute in vars(module):
        if callable(getattr(type(module), attribute, None)):
            raise NoMatch(f"{name} has {attribute} replaced on the instance")


def refuse_unit(unit: ConvUnit) -> None:
    """Anything but a plain Conv2d and a plain BatchNorm2d with running statistics that fits it."""
    _refuse_conv(unit.conv, unit.conv_name)
    if unit.bn is not None:
        _refuse_bn(unit.bn, unit)


def _refuse_conv(conv: nn.Module, name: str) -> None:
    if type(conv) is not nn.Conv2d:
        raise NoMatch(f"{name} is a {type(conv).__name__}, not a plain Conv2d")
    if conv.padding_mode != "zeros":
        raise NoMatch(f"{name} pads with {conv.padding_mode!r}, not with zeros")
    for setting in ("kernel_size", *_SETTINGS):
        _refuse_setting(conv, name, setting)
    _refuse_tensors(conv, name)
    shape = (conv.out_channels, conv.in_channels // conv.groups, *as_pair(conv.kernel_size))
    if tuple(conv.weight.shape) != shape:
        raise NoMatch(
            f"{name}.weight has shape {tuple(conv.weight.shape)} where {name} says {shape}"
        )
    _refuse_same(conv, name)
    if conv.bias is not None and tuple(conv.bias.shape) != shape[:1]:
        raise NoMatch(
            f"{name}.bias has shape {tuple(conv.bias.shape)} where {name} says {shape[:1]}"
        )


_SETTINGS = ("stride", "padding", "dilation")


def _refuse_setting(conv: nn.Conv2d, name: str, setting: str) -> None:
    """Anything but an int or a pair that PyTorch takes; a list may be edited unseen."""
    value = getattr(conv, setting)
    if setting == "padding" and isinstance(value, str) and value in ("same", "valid"):
        return
    least = 0 if setting == "padding" else 1
    values = value if isinstance(value, tuple) else (value, value)
    if len(values) != 2 or not all(type(v) is int and v >= least for v in values):
        raise NoMatch(f"{name} has {setting} {value!r}")


def _refuse_same(conv: nn.Conv2d, name: str) -> None:
    """padding='same' where it is more on one side, or refused by PyTorch."""
    if conv.padding != "same":
        return
    sides = zip(as_pair(conv.dilation), conv.weight.shape[2:], strict=True)
    if any(dilation * (size - 1) % 2 for dilation, size in sides):
        raise NoMatch(f"{name} pads one side more than the other")
    if as_pair(conv.stride) != (1, 1):
        raise NoMatch(f"{name} has padding 'same' and stride {conv.stride!r}")


def refuse_edited(unit: ConvUnit) -> None:
    """Tensors and settings that do not belong together, after edits of a unit that was fused.

    Its layers' own attributes (out_channels, ...), which PyTorch does not read, may be out of date.
    """
    conv, bn = unit.conv, unit.bn
    for setting in _SETTINGS:
        _refuse_setting(conv, unit.conv_name, setting)
    weight = conv._parameters.get("weight")
    if weight is None or weight.layout is not torch.strided or weight.dim() != 4:
        raise NoMatch(f"{unit.conv_name}.weight is no dense tensor of four dimensions")
    _refuse_same(conv, unit.conv_name)
    channels = weight.shape[0]
    vectors = [(unit.conv_name, "bias", conv._parameters.get("bias"))]
    if bn is not None:
        held = {**bn._parameters, **bn._buffers}
        for key in ("running_mean", "running_var"):
            if held.get(key) is None:
                raise NoMatch(f"{unit.bn_name} has no {key}")
        if (held.get("weight") is None) != (held.get("bias") is None):
            raise NoMatch(f"{unit.bn_name} has only one of weight and bias")
        if not isinstance(bn.eps, (int, float)) or bn.eps < 0:
            raise NoMatch(f"{unit.bn_name} has eps {bn.eps!r}")
        keys = ("running_mean", "running_var", "weight", "bias")
        vectors += [(unit.bn_name, key, held.get(key)) for key in keys]
    for name, key, vector in vectors:
        if vector is not None and tuple(vector.shape) != (channels,):
            shape = tuple(vector.shape)
            raise NoMatch(f"{name}.{key} has shape {shape}, {unit.conv_name} {channels} channels")


def _refuse_bn(bn: nn.Module, unit: ConvUnit) -> None:
    name = unit.bn_name
    if type(bn) is not nn.BatchNorm2d:
        raise NoMatch(
            f"the norm after {unit.conv_name} is {type(bn).__name__}, not a plain BatchNorm2d"
        )
    if not bn.track_running_stats or bn.running_mean is None or bn.running_var is None:
        raise NoMatch(f"{name} keeps no running statistics")
    if (bn.weight is None) != (bn.bias is None):
        raise NoMatch(f"{name} has only one of weight and bias")
    _refuse_tensors(bn, name)
    for key in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(bn, key)
        if tensor is not None and tuple(tensor.shape) != (unit.conv.out_channels,):
            channels = unit.conv.out_channels
            raise NoMatch(f"{name} has {tensor.numel()} channels, {unit.conv_name} {channels}")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of one layer, without the batch counter."""
    own = {**module._parameters, **module._buffers}
    return {key: t for key, t in own.items() if t is not None and key != "num_batches_tracked"}


def _refuse_tensors(layer: nn.Module, name: str) -> None:
    tensors = _tensors(layer)
    for key in ("weight", "running_mean", "running_var"):
        if isinstance(getattr(layer, key, None), Tensor) and key not in tensors:
            raise NoMatch(f"{name}.{key} is neither a parameter nor a buffer")
    for key, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise NoMatch(f"{name}.{key} is a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            raise NoMatch(f"{name}.{key} is a {tensor.layout} tensor of {tensor.dtype}")
    if len({t.dtype for t in tensors.values()}) > 1:
        raise NoMatch(f"{name} mixes dtypes")


def refuse_pool(pool: nn.MaxPool2d, name: str) -> None:
    """Any max-pool but a stem's: 3x3, stride 2, padding 1."""
    sizes = ((pool.kernel_size, 3), (pool.stride, 2), (pool.padding, 1), (pool.dilation, 1))
    if not all(_is_pair(value, number) for value, number in sizes):
        raise NoMatch(f"{name} does not pool 3x3 pixels with stride 2 and padding 1")
    if pool.ceil_mode or pool.return_indices:
        raise NoMatch(f"{name} rounds up or returns indices")


def _is_pair(value: object, number: int) -> bool:
    return value == number or value == (number, number) or value == [number, number]


def refuse_recipe(recipe: BlockRecipe) -> None:
    """Units that do not fit each other: channels, dtypes, devices."""
    for unit in recipe.units():
        refuse_unit(unit)
    refuse_channels(recipe)
    refuse_mixture(recipe.units())


def refuse_channels(recipe: BlockRecipe) -> None:
    """Units that do not take what the ones before them give."""
    for before, after in zip(recipe.main, recipe.main[1:], strict=False):
        if _gives(before) != _takes(after):
            raise NoMatch(
                f"{before.conv_name} gives {_gives(before)} channels, "
                f"{after.conv_name} takes {_takes(after)}"
            )
    first, last = recipe.main[0], recipe.main[-1]
    entering, taken = _takes(recipe.shortcut or first), _takes(first)
    if entering != taken:
        raise NoMatch(f"the shortcut takes {entering} channels, the main path {taken}")
    arriving, given = _gives(recipe.shortcut) if recipe.shortcut else taken, _gives(last)
    if arriving != given:
        raise NoMatch(f"the shortcut gives {arriving} channels, the main path {given}")


def _takes(unit: ConvUnit) -> int:
    return unit.conv.weight.shape[1] * unit.conv.groups


def _gives(unit: ConvUnit) -> int:
    return unit.conv.weight.shape[0]


def refuse_mixture(units: tuple[ConvUnit, ...]) -> None:
    """Layers of different dtypes or devices; norms may stay float32 beside 16-bit weights."""
    dtypes = {unit.conv.weight.dtype for unit in units}
    norms = {unit.bn.running_mean.dtype for unit in units if unit.bn is not None}
    wide = {torch.float32} if dtypes <= {torch.bfloat16, torch.float16} else set()
    if len(dtypes) > 1 or not norms <= dtypes | wide:
        names = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes | norms)
        raise NoMatch(f"mixes {', '.join(names)}")
    layers = [layer for unit in units for layer in (unit.conv, unit.bn) if layer is not None]
    devices = {t.device for layer in layers for t in _tensors(layer).values()}
    if len(devices) > 1:
        raise NoMatch(f"lies on several devices ({', '.join(sorted(map(str, devices)))})")
