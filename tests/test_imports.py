"""Nothing lower imports anything higher: the package's modules import each other in no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import resnet_fused

ROOT = Path(resnet_fused.__file__).parent
FILES = {
    ".".join(("resnet_fused", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in ROOT.rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}


def imported(name: str, path: Path) -> set[str]:
    """The package's modules that a file imports when it is loaded itself.

    Not the packages that a module lies in: `from .ops._gpu import conv` is an import of _gpu.
    """
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
            start = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*start, *((node.module or "").split(".") if node.module else [])])
            inner = {f"{source}.{alias.name}" for alias in node.names}
            # `from . import check` is an import of check, not of the package.
            found |= {m if m in MODULES else source for m in inner}
    return found & MODULES.keys() - {name}


GRAPH = {name: imported(name, path) for name, path in MODULES.items()}


def test_there_is_no_circle():
    """What only a function imports counts as late enough."""
    assert "resnet_fused._extension" in GRAPH["resnet_fused.backends"]
    TopologicalSorter(GRAPH).prepare()  # CycleError names the circle


@pytest.mark.parametrize("name", ["select", "tuned", "_gpu_kernels", "triton_kernels.launch"])
def test_what_is_below_the_ops_imports_none(name):
    reached, pending = set(), {f"resnet_fused.{name}"}
    while pending:
        reached |= pending
        pending = set().union(*(GRAPH[module] for module in pending)) - reached
    assert not [module for module in reached if module.startswith("resnet_fused.ops")]
