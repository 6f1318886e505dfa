"""Error of ResNet-18's logits against float64: what the project promises of a whole net."""

from __future__ import annotations

import copy
import statistics
from functools import cache

import pytest
import torch
from conftest import runs_here
from torch import nn

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.check import CPU_PLANS, PLAN_TRAITS

SEEDS = range(5)
FLOAT32_PLANS = [plan for plan in CPU_PLANS if torch.float32 in PLAN_TRAITS[plan].dtypes]
BFLOAT16_PLANS = [
    plan
    for plan in CPU_PLANS
    if PLAN_TRAITS[plan].dtypes == (torch.bfloat16,) and runs_here(plan)  # else it is "ours"
]


@cache
def setting(seed):
    """The plain net and the same parameters fused, an image, and the float64 logits."""
    torch.manual_seed(seed)
    plain = rf.models.resnet18(1000, block=rf.reference.Residual).eval()
    for m in plain.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    fused = rf.models.resnet18(1000).eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        oracle = copy.deepcopy(plain).double()(x.double())
    return plain, fused, x, oracle


def in_bfloat16(how, net, x):
    """The net's logits, all cast before or within autocast."""
    if how == "cast":
        net, x = copy.deepcopy(net).bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        return logits(net, x)


@cache
def eager_error_in_bfloat16(how, seed):
    plain, _, x, oracle = setting(seed)
    return error(in_bfloat16(how, plain, x), oracle)


def error(logits, oracle):
    """Relative L2 error."""
    assert logits.isfinite().all()
    return ((logits.double() - oracle).norm() / oracle.norm()).item()


def logits(net, x):
    with torch.inference_mode():
        return net(x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("word", ["none", "ours", *FLOAT32_PLANS])
def test_float32(word, memory_format):
    """At most twice eager's error, or 2e-6."""
    plain, fused, x, oracle = setting(0)
    x = x.contiguous(memory_format=memory_format)
    with select.forced(word):
        got = error(logits(fused, x), oracle)
        rows = rf.report(fused)
    assert all(row.fused for row in rows)
    assert got <= max(2 * error(logits(plain, x), oracle), 2e-6)


@pytest.mark.parametrize("word", ["none", "ours", *BFLOAT16_PLANS, "torch"])
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_bfloat16(how, word):
    """At most 1.1 times eager's error and 3.8e-3, each the median of five seeds."""
    ours = []
    for seed in SEEDS:
        _, fused, x, oracle = setting(seed)
        with select.forced(word):
            ours.append(error(in_bfloat16(how, fused, x), oracle))
            assert all(row.fused for row in rf.report(fused))
    eager = [eager_error_in_bfloat16(how, seed) for seed in SEEDS]
    limit = min(1.1 * statistics.median(eager), 3.8e-3)
    assert statistics.median(ours) <= limit, (ours, eager)


@pytest.mark.parametrize("word", ["none", "ours"])
def test_float16_and_float64(word):
    plain, fused, x, oracle = setting(0)
    for dtype, factor, least in ((torch.float16, 1.1, 0.0), (torch.float64, 2.0, 1e-13)):
        nets = [copy.deepcopy(net).to(dtype) for net in (plain, fused)]
        theirs = error(logits(nets[0], x.to(dtype)), oracle)
        with select.forced(word):
            ours = error(logits(nets[1], x.to(dtype)), oracle)
        assert ours <= max(factor * theirs, least), dtype


def test_predictions_agree():
    for seed in SEEDS:
        plain, fused, x, oracle = setting(seed)
        assert logits(fused, x).argmax() == oracle.argmax()
        assert logits(plain, x).argmax() == oracle.argmax()


def test_compiled_net():
    torch._dynamo.reset()
    _, fused, x, oracle = setting(0)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(x), oracle) <= 2e-6
    torch._dynamo.reset()
