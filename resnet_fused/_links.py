"""The children of a fused module as they were when it was fused: what has changed since?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules import module as _module

from . import guard

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(_module, "_global" + name) for name in _HOOKS]


@dataclass(frozen=True, eq=False)
class Link:
    """A child as it was when the module was fused."""

    children: dict[str, nn.Module | None]  # the parent's
    name: str
    path: str
    child: nn.Module
    kind: type
    counts: tuple[int, int]  # of the child's own children and parameters


def link(children: dict[str, nn.Module | None], name: str, path: str) -> Link:
    child = children[name]
    return Link(children, name, path, child, type(child), _counts(child))


def _counts(module: nn.Module) -> tuple[int, int]:
    return (len(module._modules), len(module._parameters))


def links_below(module: nn.Module, prefix: str = "") -> Iterator[Link]:
    """Every descendant of a module."""
    for name, child in module._modules.items():
        if child is not None:
            path = f"{prefix}{name}"
            yield link(module._modules, name, path)
            yield from links_below(child, path + ".")


def changed(link: Link) -> str | None:
    """Why the child can no longer be taken for what it was, or None."""
    child = link.child
    if link.children.get(link.name) is not child:
        return f"{link.path} was replaced"
    if type(child) is not link.kind:
        return f"{link.path} became a {type(child).__name__}"
    if _counts(child) != link.counts:
        return f"{link.path} has other children or parameters than it had"
    if has_hooks(child):
        return f"{link.path} has hooks"
    if "forward" in child.__dict__:
        return f"forward of {link.path} was patched"
    return None


def facts_of(link: Link) -> list[guard.Fact]:
    """What `changed` looks at."""
    child, (children, parameters) = link.child, link.counts
    return [
        guard.item_is(link.children, link.name, child),
        guard.type_is(child, link.kind),
        guard.item_length(child.__dict__, "_modules", children),
        guard.item_length(child.__dict__, "_parameters", parameters),
        *hook_facts(child),
        guard.absent(child.__dict__, "forward"),
    ]


def hook_facts(module: nn.Module) -> list[guard.Fact]:
    return [guard.item_length(module.__dict__, name, 0) for name in _HOOKS]


GLOBAL_HOOK_FACTS = [guard.item_length(_module.__dict__, "_global" + name, 0) for name in _HOOKS]


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    return any(_GLOBAL_HOOKS)
