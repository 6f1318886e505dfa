"""fuse, unfuse, refresh: fused modules into a model, out of it again, and their caches dropped."""

from __future__ import annotations

from types import MethodType

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import check
from ._call import deep_copy
from ._find_chains import join_chains, part_chains
from ._fused import FusedModule
from ._runs import set_formats
from ._survey import Survey, survey
from ._trace import HOOKS
from ._wrapper import Wrapper
from .head import HeadLayer, heads
from .ops import extension_error
from .ops._kept import kept_weights
from .residual import fused_block
from .slots import PassSlot, install_site

OUTPUT_FORMATS = ("channels_last", "preserve")
_ELSE = " or be given with inplace=True"


def fuse(
    model: nn.Module,
    *,
    inplace: bool = False,
    strict: bool = False,
    output_format: str = "channels_last",
    exact_nonfinite: bool = False,
) -> nn.Module:
    """The model with fused modules in place of residual blocks and conv-BN(-ReLU) sequences.

    Only what was proved equal by tracing is swapped; `resnet_fused.report` lists the rest with the
    reasons. The state_dict stays what it was, training too. What has been fused already stays.

    inplace: change `model` itself instead of a deep copy. Use the result in either case: a model
        that is one residual block cannot be replaced in place.
    strict: raise ValueError, with the reasons, when nothing could be fused.
    output_format: "channels_last", the layout in which fused modules compute and hand on their
        output; or "preserve" for models that call `.view` or otherwise rely on strides: every run
        of adjacent fused modules gives its output in the layout that the plain modules would have
        given it (contiguous, for a longer run, even where its input is channels_last).
    exact_nonfinite: True keeps every NaN, Inf and value near overflow (above 1e30) where a direct
        convolution would put it, by not using Winograd, which spreads it over a tile of its output.
        RESNET_FUSED_EXACT_NONFINITE=1 does so for a whole process.

    The global average pool and linear layers behind it get faster kernels for a few images; they
    are not fused with anything and not in the report.
    Fuse after configuring the model: `forward` is looked at once, as its attributes are then.
    Layers of a stem are one op where their parent's forward calls them, or a Sequential that holds
    them all; whoever else calls one, as a U-Net may, gets what that layer computes. But a graph
    that torch.compile or torch.export captures has the op in any case: fuse the U-Net as a whole.
    Raises TypeError for anything but a module, ValueError for an unknown output_format.
    """
    check.module("fuse", "model", model)
    check.one_of("fuse", "output_format", output_format, OUTPUT_FORMATS)
    model = model if inplace else deep_copy("fuse", "model", model, _ELSE)
    found = survey(model)
    kind = type(model).__name__
    for name, recipe in found.blocks:
        model = _replace(model, name, fused_block(model.get_submodule(name), recipe))
    for name, site in found.sites:
        install_site(model.get_submodule(name), site)
    if _holds_fused(model):
        for parent in list(model.modules()):
            # What holds nothing fused may be a block that was left as it is.
            if not isinstance(parent, Wrapper) and _holds_fused(parent):
                parent._modules.update(heads(parent))
    elif strict:
        raise ValueError(f"fuse: nothing could be fused in {kind}: {_reasons(found)}")
    set_formats(model, output_format)
    join_chains(model)
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.exact_nonfinite = exact_nonfinite
    return model


def unfuse(fused: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with every fused module replaced by the plain one that it stands for.

    The exact inverse of `fuse`: the same classes and tensors, the training flags of `fused`. Fused
    modules that were built directly become their plain counterparts. Hooks registered since fusing
    move along. inplace: change `fused` itself, not a deep copy; use the result in either case.
    Raises TypeError for anything but a module.
    """
    check.module("unfuse", "fused", fused)
    model = fused if inplace else deep_copy("unfuse", "fused", fused, _ELSE)
    part_chains(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Wrapper):
            _carry_over(module)
        if isinstance(module, FusedModule | PassSlot | HeadLayer):
            model = _replace(model, name, module.original())
    return model


def refresh(fused: nn.Module) -> None:
    """Drops every packed weight below `fused`; the next call packs again.

    For edits that nothing tells of: `tensor.data` on a GPU. Also gives back what is kept for the
    whole process: memory of large outputs that were freed, packed weights of compiled graphs.
    Raises TypeError for a non-module.
    """
    check.module("refresh", "fused", fused)
    kept_weights.drop()
    if extension_error is None:
        torch.ops.resnet_fused.drop_output_memory()
    for module in fused.modules():
        if isinstance(module, FusedModule):
            module.drop_packed()


def _holds_fused(model: nn.Module) -> bool:
    return any(isinstance(module, FusedModule) for module in model.modules())


def _replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """model with `new` at a path; the root's path is ""."""
    if not name:
        return new
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = new
    return model


def _carry_over(wrapper: Wrapper) -> None:
    """What a wrapper got since fusing goes on to its original, which had none of it then: hooks, a
    patched forward, parametrizations."""
    own, original = wrapper.__dict__, wrapper.__dict__["_original"]
    for hooks in (*HOOKS, *_HOOK_OPTIONS):
        original.__dict__[hooks] = own[hooks]
    forward = own.get("forward")
    if forward is not None:
        if isinstance(forward, MethodType) and forward.__self__ is wrapper:
            forward = MethodType(forward.__func__, original)
        original.__dict__["forward"] = forward
        own["_attribute_set"] = "forward"  # whoever calls the wrapper's own gets the plain module
    if parametrize.is_parametrized(wrapper):
        # They are children, which both share; what is missing is a class with their properties.
        missing = [n for n in wrapper.parametrizations if not hasattr(type(original), n)]
        if missing:
            parametrize._inject_new_class(original)
        for name in missing:
            parametrize._inject_property(original, name)


_HOOK_OPTIONS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_is_full_backward_hook",
)


def _reasons(found: Survey) -> str:
    most = 5
    reasons = [f"{left.name or 'the model'}: {left.reason}" for left in found.left]
    rest = [f"and {len(reasons) - most} more"] if len(reasons) > most else []
    return "; ".join(reasons[:most] + rest) or "it has no residual block and no conv-BN sequence"
