"""What of a model recorded kernels depend on: modules, hooks, modes, and where tensors lie."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from . import guard
from ._fused import FusedModule
from ._links import GLOBAL_HOOK_FACTS, has_global_hooks, has_hooks, hook_facts

_AUTOCAST = (
    torch._C._is_any_autocast_enabled,
    partial(torch.is_autocast_enabled, "cuda"),
    partial(torch.get_autocast_dtype, "cuda"),
)


class NotRecordable(ValueError):
    """Says why a graph would not do what the model does."""


def facts_of_modules(model: nn.Module) -> list[guard.Fact]:
    """Of every module, fused or not. Raises NotRecordable."""
    if has_global_hooks():
        raise NotRecordable("hooks on all modules are set")
    facts = [*GLOBAL_HOOK_FACTS, *(guard.returns(asked, asked()) for asked in _AUTOCAST)]
    for name, module in model.named_modules():
        if has_hooks(module):
            raise NotRecordable(f"{name or 'the model'} has hooks")
        facts += [*hook_facts(module), guard.attribute(module, "training")]
        own = module.__dict__
        if "forward" in own:
            facts.append(guard.item_is(own, "forward", own["forward"]))
        else:
            facts.append(guard.absent(own, "forward"))
        facts.append(guard.item_length(module.__dict__, "_modules", len(module._modules)))
        for child, held in module._modules.items():
            facts.append(guard.item_is(module._modules, child, held))
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                facts.append(guard.item_is(owner, key, tensor))
                if tensor is not None:
                    facts.append(guard.returns(tensor.data_ptr, tensor.data_ptr()))
    return facts


def facts_of_fused(model: nn.Module) -> list[guard.Fact]:
    """Of the fused modules that have packed what they need. Raises NotRecordable."""
    facts = []
    for name, module in model.named_modules():
        if not isinstance(module, FusedModule) or not module.status().fused:
            continue  # the plain module runs, on tensors that are watched anyway
        found = module.facts()
        if found is None:
            raise NotRecordable(f"{name or 'the model'} holds inference tensors")
        facts += found
    return facts


def read_by_kernels(model: nn.Module) -> list[Tensor]:
    """Tensors that recorded kernels read, wherever the model's own references go."""
    units = [u for m in model.modules() if isinstance(m, FusedModule) for u in m._cache.held()]
    packed = [t for unit in units for t in unit.operands]
    return packed + [t.detach() for t in (*model.parameters(), *model.buffers())]
