"""report: every fused module and every one left alone, and the state it must not change."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from refused_blocks import CASES, randomized
from torch import nn
from torchvision_style import BasicBlock, ResNet

from resnet_fused import _sites, reference
from resnet_fused.conv_bn import FusedConvBN
from resnet_fused.fuse import fuse, refresh
from resnet_fused.report import Report, Row, report
from resnet_fused.residual import FusedResidual

X = torch.randn(2, 3, 33, 35, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [2, 1, 1, 1], width=8)
    model.layer1[1].relu = nn.GELU()
    model.layer3[0].downsample[1] = nn.GroupNorm(2, 32)
    return randomized(model).eval()


def names(rows):
    return [row.name for row in rows]


def test_rows_of_a_fused_model(net):
    rows = report(fuse(net))
    assert names(rows) == ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]
    assert [row.kind for row in rows] == ["conv_bn"] + ["basic"] * 5
    assert [row.fused for row in rows] == [True, True, False, True, False, True]
    left = {row.name: row for row in rows if not row.fused}
    assert left["layer1.1"].reason == "the activation after the addition is GELU (relu)"
    assert left["layer3.0"].reason.startswith("the norm after downsample.0 is GroupNorm")
    for row in left.values():
        assert (row.backend, row.packed_bytes) == ("eager", 0)
    for row in rows:
        if row.fused:
            assert (row.backend, row.packed_bytes) == ("not run yet", 0)


def test_is_a_sequence(net):
    rows = report(fuse(net))
    assert isinstance(rows, Report)
    assert len(rows) == len(list(rows)) == 6
    assert isinstance(rows[0], Row)
    assert rows[-1].name == "layer4.0"
    assert names(rows[1:3]) == ["layer1.0", "layer1.1"]
    assert next(reversed(rows)).name == "layer4.0"


def test_with_an_example_it_names_what_ran(net):
    fused = fuse(net)
    for row in report(fused, X):
        if row.fused:
            assert row.backend not in ("", "eager", "not run yet")
            assert row.reason
            assert row.packed_bytes > 0
    assert report(fused)[0] == report(fused, X)[0], "the shapes seen so far"
    refresh(fused)
    assert report(fused)[0].packed_bytes == 0


@pytest.mark.parametrize("training", [True, False])
def test_changes_nothing(net, training):
    fused = fuse(net).train(training)
    fused.layer2.eval()
    fused.conv1.train()
    state = {key: value.clone() for key, value in fused.state_dict().items()}
    flags = {name: m.training for name, m in fused.named_modules()}
    classes = [type(m) for m in fused.modules()]
    rng = torch.get_rng_state()
    report(fused, X)
    report(fused)
    for key, value in fused.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert {name: m.training for name, m in fused.named_modules()} == flags
    assert [type(m) for m in fused.modules()] == classes
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()


def test_flags_come_back_when_the_model_fails(net):
    fused = fuse(net).train()
    with pytest.raises(ValueError, match=r"report: fused must run on x, got "):
        report(fused, torch.randn(2, 4, 8, 8))
    assert all(m.training for m in fused.modules())


def test_training_mode_says_so(net):
    rows = report(fuse(net).train())
    assert [row.reason for row in rows if row.name == "layer1.0"] == ["training"]
    assert not rows[1].fused
    assert report(fuse(net).train(), X)[1].fused, "with an example: in eval mode"


def test_random_layers_in_eval_mode_do_not_disturb():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    fused = fuse(nn.Sequential(BasicBlock(3, 3), Noise()).eval())
    rng = torch.get_rng_state()
    report(fused, X)
    assert torch.equal(torch.get_rng_state(), rng)


def test_model_that_is_not_fused_yet(net):
    rows = report(net)
    assert not any(row.fused for row in rows)
    assert rows[0] == Row(
        "conv1", "conv_bn", False, "eager", "can be fused: resnet_fused.fuse does it", 0
    )
    assert rows[2].reason == "the activation after the addition is GELU (relu)"


def test_modules_that_were_built_fused():
    model = nn.Sequential(
        FusedConvBN(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), FusedResidual(8, 8)
    ).eval()
    rows = report(model, X)
    assert [(row.name, row.kind, row.fused) for row in rows] == [
        ("0", "conv_bn", True),
        ("1", "basic", True),
    ]


def test_the_model_itself():
    rows = report(fuse(reference.Residual(3, 8, True)).eval())
    assert names(rows) == [""]
    assert "(the model)" in str(rows)


def test_changes_after_fusing_are_reported(net):
    fused = fuse(net)
    fused.layer1[0].conv1.register_forward_hook(lambda m, args, out: out * 2)
    fused.layer2[0].bn1 = nn.BatchNorm2d(16).eval()
    rows = {row.name: row for row in report(fused, X)}
    assert rows["layer1.0"].fused is False
    assert "hook" in rows["layer1.0"].reason
    assert rows["layer2.0"].fused is False
    assert "bn1 was" in rows["layer2.0"].reason
    assert rows["layer4.0"].fused


def test_kind_of_what_is_left_alone():
    class Three(CASES["AlphaTwo"][0]):
        def main(self, x):
            return self.conv2(super().main(x))

    rows = report(nn.Sequential(Three(), CASES["AlphaTwo"][0]()))
    assert [row.kind for row in rows] == ["bottleneck", "basic"]


def test_conv_bn_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding_mode="reflect", padding=1), nn.BatchNorm2d(8))
    (row,) = report(fuse(model))
    assert (row.name, row.kind, row.fused) == ("0", "conv_bn", False)
    assert row.reason == "0 pads with 'reflect', not with zeros"


@pytest.mark.parametrize(
    "example",
    [X, (X,), [X], {"x": X}],
)
def test_examples_of_every_kind(net, example):
    assert report(fuse(net), example)[0].packed_bytes > 0


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = BasicBlock(3, 3)

        def forward(self, a, b):
            return self.block(a) + b

    (row,) = report(fuse(Two().eval()), (X, 1.0))
    assert row.packed_bytes > 0


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"report: fused must be a torch.nn.Module, got int"):
        report(3)
    with pytest.raises(
        TypeError, match=r"report: fused must be a torch.nn.Module, got the class ReLU"
    ):
        report(nn.ReLU)
    with pytest.raises(
        TypeError,
        match=r"report: x must be a tensor, a tuple of arguments or a dict .*, got int",
    ):
        report(nn.ReLU(), 3)


def test_prints_as_a_table(net):
    text = str(report(fuse(net), X))
    lines = text.splitlines()
    assert repr(report(fuse(net), X)).splitlines()[0] == lines[0]
    for heading in ("name", "kind", "fused", "backend", "reason", "packed"):
        assert heading in lines[0]
    assert len(lines) == 2 + 6 + 1
    assert "the activation after the addition is GELU (relu)" in text
    assert lines[-1].startswith("4 of 6 fused, ")
    assert lines[-1].endswith(("kB packed", "MB packed"))
    assert "layer1.1" in lines[4]
    assert "no" in lines[4].split()


def test_no_row_is_cut_in_a_pipe():
    code = (
        "import torch\n"
        "from resnet_fused.fuse import fuse\n"
        "from resnet_fused.report import report\n"
        "from resnet_fused.reference import Residual\n"
        "from torch import nn\n"
        "m = nn.Sequential(nn.Sequential(Residual(3, 16, True, 2))).eval()\n"
        "m.add_module('a_' + 'long_' * 30 + 'name', Residual(16, 16))\n"
        "print(report(fuse(m), torch.randn(1, 3, 32, 32)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "40"},
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2 + 2 + 1
    assert "a_" + "long_" * 30 + "name" in lines[3]
    assert "…" not in done.stdout


def test_a_model_without_anything_to_fuse():
    rows = report(nn.Linear(2, 2))
    assert len(rows) == 0
    assert str(rows) == "no residual block and no conv-BN sequence"


def test_a_parent_that_cannot_be_traced_is_traced_once(monkeypatch):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) if float(x.sum()) > 0 else x

    traced = []

    def record(module, *arguments):
        traced.append(type(module).__name__)
        return sites_record(module, *arguments)

    sites_record = _sites.record
    monkeypatch.setattr(_sites, "record", record)
    (row,) = report(Branches().eval())
    assert (row.name, row.kind, row.fused) == ("", "conv_bn", False)
    assert row.reason.startswith("forward cannot be traced")
    assert traced == ["Branches"]
