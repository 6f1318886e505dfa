"""Error of the fused net's logits against float64, beside eager's own and what is allowed.

float32: error_limit's, twice eager's or 2e-6, with every seed. bfloat16, cast or under autocast,
tighter than that: the median over the seeds at most 1.1 times eager's, and 3.8e-3. One image,
weights that look trained.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused as rf

from .common import error_limit, exact_logits, plain_net, random_images, relative_error

SEEDS = range(5)
BFLOAT16_LIMIT, BFLOAT16_FACTOR = 3.8e-3, 1.1
CAST, AUTOCAST = "bfloat16", "bfloat16 autocast"
ROWS = (  # net, precision
    ("resnet18", "float32"),
    ("resnet50", "float32"),
    ("resnet18", CAST),
    ("resnet18", AUTOCAST),
)


def measure(size: int, on_stage: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
    """A record's "accuracy": one entry a row of ROWS."""
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {row: [] for row in ROWS}
    for i, seed in enumerate(SEEDS):
        on_stage("accuracy, seeds", i, len(SEEDS))
        for model in {model: None for model, _ in ROWS}:
            net = plain_net(model, seed=seed)
            x = random_images(1, size=size, seed=seed)
            exact = exact_logits(net, x)
            for precision in (precision for name, precision in ROWS if name == model):
                pairs[model, precision].append(errors(net, x, exact, precision))
    return [entry(*row, errors) for row, errors in pairs.items()]


def errors(net: nn.Module, x: Tensor, exact: Tensor, precision: str) -> tuple[float, float]:
    """Relative L2 of the fused net's logits and of eager's."""
    if precision == CAST:
        net, x = copy.deepcopy(net).bfloat16(), x.bfloat16()
    fused = rf.fuse(net)
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == AUTOCAST)
    with torch.inference_mode(), cast:
        ours, eager = fused(x), net(x)
    return relative_error(ours, exact), relative_error(eager, exact)


def entry(model: str, precision: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """One row from (ours, eager's) of every seed; in float32 the seed nearest to failing."""
    if precision == "float32":
        error, eager = max(pairs, key=lambda pair: pair[0] / error_limit(pair[1], torch.float32))
        limit = error_limit(eager, torch.float32)
    else:
        error, eager = (statistics.median(column) for column in zip(*pairs, strict=True))
        limit = min(BFLOAT16_FACTOR * eager, BFLOAT16_LIMIT)
    row = {"model": model, "precision": precision, "seeds": len(pairs)}
    return row | {"error": error, "eager_error": eager, "limit": limit, "ok": error <= limit}
