"""docs/design.md names what there is: modules, folders of sources, ops."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from resnet_fused import _schemas

ROOT = Path(__file__).resolve().parent.parent
DESIGN = (ROOT / "docs" / "design.md").read_text()
MAP = DESIGN[: DESIGN.index("### Ops")]
OPS = DESIGN[DESIGN.index("### Ops") : DESIGN.index("### Who chooses a plan")]
# Questions that other parts of the package ask of an extension, and settings of it.
ASIDE = {"drop_output_memory", "set_block_budget", "uses_tf32"}
ASIDE |= {"cpu_isa", "set_cpu_isa", "cpu_features", "cuda_configurations", "cuda_image_error"}
ASIDE |= {"conv_bn_act_cuda_ranked", "conv_bn_act_cuda_refusal"}
ASIDE |= {"conv_bn_act_pool_refusal", "bottleneck_tail_refusal"}

modules = [
    path.relative_to(ROOT / "resnet_fused").with_suffix("")
    for folder in (".", "ops")
    for path in sorted((ROOT / "resnet_fused" / folder).glob("*.py"))
    if not path.stem.startswith("__")
]


@pytest.mark.parametrize("module", modules, ids=str)
def test_every_module_is_on_the_map(module):
    assert re.search(rf"(?<![a-z_]){re.escape(module.name)}(?![a-z_])", MAP)


def test_nothing_on_the_map_is_missing():
    named = re.findall(r"^((?:csrc|resnet_fused|benchmarks)/[\w./*]+|\w+\.py)\s", MAP, re.MULTILINE)
    assert len(named) > 50
    assert [name for name in named if not list(ROOT.glob(name.rstrip("/")))] == []


def test_every_op_is_in_the_table():
    ops = {schema.partition("(")[0] for schema in _schemas._SCHEMAS}
    listed = set(re.findall(r"`(\w+)", OPS))
    assert ops - ASIDE <= listed
