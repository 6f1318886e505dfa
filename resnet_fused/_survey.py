"""What of a model can be fused: every residual block and conv-BN site, or why it is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from ._wrapper import Wrapper
from .match import Verdict, call_graphs, find_sites, inspect_block
from .recipe import BlockRecipe, NoMatch, Site


@dataclass(frozen=True)
class Left:
    """Something a user would expect to be fused, and why it is not."""

    name: str
    kind: str
    reason: str


@dataclass(eq=False)
class Survey:
    """Names are dotted paths below the model that was looked at, "" for the model itself."""

    blocks: list[tuple[str, BlockRecipe]] = field(default_factory=list)
    sites: list[tuple[str, Site]] = field(default_factory=list)  # by the name of the parent
    left: list[Left] = field(default_factory=list)


def join(parent: str, child: str) -> str:
    """The dotted path of a child."""
    return f"{parent}.{child}" if parent and child else parent or child


def survey(model: nn.Module) -> Survey:
    """Looks at every module of `model` that is not fused yet, the innermost blocks first.

    A module that a user would call a residual block is fused or left alone as a whole; sites are
    looked for everywhere else.
    """
    return _Surveyor(model).found


class _Surveyor:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found = Survey()
        self.names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(id(module), []).append(name)
        self.verdicts: dict[int, Verdict] = {}
        self.graphs: dict[str, list[fx.Graph] | NoMatch] = {}
        self._find_blocks(model, {})
        for name, module in list(self._outside(model, "")):
            self._add_sites(name, module)

    # -- blocks -----------------------------------------------------------------------------------

    def _find_blocks(self, module: nn.Module, seen: dict[int, bool]) -> bool:
        """Whether `module` is or holds a block, fused ones included; notes the innermost ones."""
        if id(module) not in seen:
            seen[id(module)] = False  # until it is known
            if isinstance(module, Wrapper) or self._holds_blocks(module, seen):
                seen[id(module)] = True
            else:
                verdict = inspect_block(module)
                if verdict.candidate:
                    seen[id(module)] = True
                    self._add_block(module, verdict)
        return seen[id(module)]

    def _holds_blocks(self, module: nn.Module, seen: dict[int, bool]) -> bool:
        holds = False
        for child in module.children():
            holds |= self._find_blocks(child, seen)  # every child, whatever the first ones say
        return holds

    def _add_block(self, module: nn.Module, verdict: Verdict) -> None:
        self.verdicts[id(module)] = verdict
        name = self.names[id(module)][0]
        reason = verdict.reason or self._shared(module, verdict.recipe)
        if reason:
            self.found.left.append(Left(name, verdict.kind, reason))
        else:
            self.found.blocks.append((name, verdict.recipe))

    def _shared(self, block: nn.Module, recipe: BlockRecipe) -> str:
        """Why a block cannot be taken on its own, or ""."""
        name, *others = self.names[id(block)]
        if others:
            return f"it is shared: also registered as {others[0]}"
        for unit in recipe.units():
            for path, layer in ((unit.conv_name, unit.conv), (unit.bn_name, unit.bn)):
                names = self.names.get(id(layer), []) if name else []
                outside = [n for n in names if not n.startswith(f"{name}.")]
                if outside:
                    return f"{path} is shared: also registered as {outside[0]}"
        return ""

    # -- sites ------------------------------------------------------------------------------------

    def _outside(self, module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        """Every module that is not part of a block, each once."""
        if isinstance(module, Wrapper) or id(module) in self.verdicts:
            return
        if self.names[id(module)][0] == name:
            yield name, module
        for child_name, child in module.named_children():
            yield from self._outside(child, join(name, child_name))

    def _add_sites(self, name: str, parent: nn.Module) -> None:
        if not any(isinstance(child, nn.modules.conv._ConvNd) for child in parent.children()):
            return
        sites, refused = find_sites(parent, self._graphs(name, parent))
        for site in sites:
            reason = self._site_shared(site) or self._reached_into(name)
            if reason:
                refused.append((site.unit.conv_name, reason))
            else:
                self.found.sites.append((name, site))
        self.found.left += [Left(join(name, conv), "conv_bn", reason) for conv, reason in refused]

    def _site_shared(self, site: Site) -> str:
        unit = site.unit
        for path, layer in ((unit.conv_name, unit.conv), (unit.bn_name, unit.bn)):
            others = self.names[id(layer)][1:]
            if others:
                return f"{path} is shared: also registered as {others[0]}"
        return ""

    def _reached_into(self, parent: str) -> str:
        """Why others than parent.forward may call its children, or "", by the ancestors' traces."""
        path = parent.split(".") if parent else []
        for depth in range(len(path)):
            name = ".".join(path[:depth])
            ancestor = self.model.get_submodule(name)
            if _calls_children_only(ancestor):
                continue
            graphs = self._graphs(name, ancestor)
            title = name or type(ancestor).__name__
            if isinstance(graphs, NoMatch):
                return f"{title} may call it apart from the rest of {parent}: {graphs}"
            for graph in graphs:
                for node in graph.nodes:
                    called = join(name, str(node.target)) if node.op == "call_module" else ""
                    if called.startswith(f"{parent}."):
                        return f"{title} calls {called} apart from the rest of {parent}"
        return ""

    def _graphs(self, name: str, module: nn.Module) -> list[fx.Graph] | NoMatch:
        if name not in self.graphs:
            try:
                self.graphs[name] = call_graphs(module)
            except NoMatch as reason:
                self.graphs[name] = reason
        return self.graphs[name]


def _calls_children_only(module: nn.Module) -> bool:
    """torch's own containers, and modules without a forward."""
    own = type(module).__module__.startswith("torch.nn.")
    return (own and "forward" not in vars(module)) or type(module).forward is nn.Module.forward
