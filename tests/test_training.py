"""Training: the eager block's outputs, gradients and statistics; gradients in eval mode, too."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close_as_eager, assert_same, randomize
from torch import nn

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.recipe import ConvUnit, Site
from resnet_fused.reference import Bottleneck, Residual

pytestmark = pytest.mark.usefixtures("one_thread")


def site():
    net = nn.Sequential(nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU())
    rf.slots.install_site(net, Site(ConvUnit(net[0], net[1], "relu", "0", "1"), "2"))
    return net


# name: (fused module, the plain one)
PAIRS = {
    "identity": (lambda: rf.FusedResidual(6, 6), lambda: Residual(6, 6)),
    "1x1": (lambda: rf.FusedResidual(6, 9, True, 2), lambda: Residual(6, 9, True, 2)),
    "bottleneck": (lambda: rf.FusedBottleneck(6, 3, True), lambda: Bottleneck(6, 3, True)),
    "conv_bn": (
        lambda: rf.FusedConvBN(nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9)),
        lambda: nn.Sequential(nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU()),
    ),
    "site": (
        site,
        lambda: nn.Sequential(nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU()),
    ),
}


def pair(name, dtype=torch.float32, training=True):
    """The fused module and the plain one with the same values."""
    built = []
    for build in PAIRS[name]:
        torch.manual_seed(4)
        built.append(randomize(build()).to(dtype).train(training))
    for a, b in zip(each_value(built[0]), each_value(built[1]), strict=True):
        assert_same(a, b)
    return built


def each_value(module):
    return [*module.parameters(), *module.buffers()]


def images(dtype=torch.float32, seed=0, batch=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 6, 8, 7, generator=g).to(dtype)


def wide_twin(plain):
    return copy.deepcopy(plain).double()


def gradients(module, x, weights=None):
    """Output, and gradients of the input and every parameter of a weighted sum of squares."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    weights = images(seed=9)[:, :1, : y.shape[2], : y.shape[3]].to(y.dtype)
    (y.square() * weights).mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


# ---- train mode: the very bits ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", PAIRS)
def test_training_is_eagers_bit_for_bit(name, layout, dtype):
    """Outputs, gradients and running statistics over three optimizer steps."""
    fused, plain = pair(name, dtype)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (fused, plain)]
    for step in range(3):
        x = images(dtype, seed=step).contiguous(memory_format=layout)
        found = [gradients(m, x) for m in (fused, plain)]
        for ours, theirs in zip(*found, strict=True):
            assert_same(ours, theirs)
        for optimizer in optimizers:
            optimizer.step()
        for ours, theirs in zip(each_value(fused), each_value(plain), strict=True):
            assert_same(ours, theirs)


@pytest.mark.parametrize("name", PAIRS)
def test_training_with_gradients_off_updates_statistics(name):
    fused, plain = pair(name)
    with torch.no_grad():
        assert_same(fused(images()), plain(images()))
    for ours, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", PAIRS)
def test_training_under_autocast(name):
    fused, plain = pair(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [gradients(m, images()) for m in (fused, plain)]
    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", PAIRS)
def test_training_and_evaluating_in_turns(name):
    """An epoch as people write it: after each step the evaluation sees the new values."""
    fused, plain = pair(name)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (fused, plain)]
    for step in range(4):
        for module, optimizer in zip((fused, plain), optimizers, strict=True):
            module.train()
            gradients(module, images(seed=step))
            optimizer.step()
            module.eval()
        x = images(seed=100 + step)
        with torch.no_grad():
            ours, theirs = fused(x), plain(x)
            assert_close_as_eager(ours, theirs, wide_twin(plain)(x.double()), allowed=2e-6)
    for ours, theirs in zip(each_value(fused), each_value(plain), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", PAIRS)
def test_training_flags_follow(name):
    fused, _ = pair(name)
    for mode in (True, False, True):
        fused.train(mode)
        assert all(m.training is mode for m in fused.modules())
        originals = [m.__dict__["_original"] for m in fused.modules() if "_original" in vars(m)]
        assert originals
        for m in fused.modules():
            if hasattr(m, "original"):
                assert m.original().training is mode


# ---- frozen batch norms ------------------------------------------------------------------------


def freeze(module):
    """Fine-tuning with frozen batch norms: they stay in eval mode while the rest trains."""
    for m in module.modules():
        if hasattr(m, "running_mean"):
            m.eval()
            for p in m.parameters(recurse=False):
                p.requires_grad_(False)


@pytest.mark.parametrize("name", PAIRS)
def test_frozen_norms_in_training(name):
    fused, plain = pair(name)
    freeze(fused), freeze(plain)
    found = [gradients(m, images()) for m in (fused, plain)]
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_same(ours, theirs)
    for ours, theirs in zip(each_value(fused), each_value(plain), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["identity", "1x1", "bottleneck", "conv_bn"])
def test_norm_left_in_training_mode(name):
    """eval() on the block, then train() on a norm: batch statistics, which only eager computes."""
    fused, plain = pair(name, training=False)
    for module in (fused, plain):
        next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)).train()
    with torch.no_grad():
        assert_same(fused(images()), plain(images()))
    for ours, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        assert_same(ours, theirs)


# ---- gradients in eval mode --------------------------------------------------------------------


@pytest.mark.parametrize("force", ["ours", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_in_eval_mode(name, dtype, force):
    """The lesson calls its net with gradients on: errors at most twice eager's, for every one."""
    fused, plain = pair(name, dtype, training=False)
    x = images(dtype)
    with select.forced(force):
        ours = gradients(fused, x)
    theirs, oracle = gradients(plain, x), gradients(wide_twin(plain), x.double())
    assert len(ours) == len(oracle)
    # A sign that rounding changed before a ReLU changes one element's gradient by its whole size.
    allowed = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-13}[dtype]
    for i, (a, b, c) in enumerate(zip(ours, theirs, oracle, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == c.shape
        error, eagers = (a - c).norm().item(), (b - c).norm().item()
        assert error <= 2 * eagers + allowed * c.norm().item(), f"number {i}"


@pytest.mark.parametrize("name", PAIRS)
def test_gradcheck_in_eval_mode(name):
    fused, _ = pair(name, torch.float64, training=False)
    x = images(torch.float64, batch=1)[:, :, :4, :3].requires_grad_()
    parameters = tuple(fused.parameters())

    def call(x, *_):
        # gradcheck edits single values behind the version counters: eval() compares all of them.
        return fused.eval()(x)

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("name", ["identity", "1x1", "conv_bn"])
def test_double_backward_in_eval_mode(name):
    fused, plain = pair(name, torch.float64, training=False)
    found = []
    for module in (fused, plain):
        module.zero_grad()
        x = images(torch.float64).requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    x = images(torch.float64, batch=1)[:, :, :3, :2].requires_grad_()
    assert torch.autograd.gradgradcheck(fused, (x,))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("wanted", ["input", "conv", "norm", "nothing"])
def test_gradients_of_a_part(name, wanted):
    """Frozen layers: gradients arrive where they are wanted and nowhere else."""
    fused, plain = pair(name, training=False)
    results = []
    for module in (fused, plain):
        for m in module.modules():
            for p in m.parameters(recurse=False):
                is_norm = hasattr(m, "running_mean")
                p.requires_grad_({"conv": not is_norm, "norm": is_norm}.get(wanted, False))
        x = images().requires_grad_(wanted == "input")
        y = module(x)
        assert y.requires_grad == (wanted != "nothing")
        if y.requires_grad:
            y.square().sum().backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_gradients_accumulate():
    fused, _ = pair("1x1", training=False)
    fused(images()).sum().backward()
    once = [p.grad.clone() for p in fused.parameters()]
    fused(images()).sum().backward()
    for p, g in zip(fused.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_gradients_through_two_blocks_and_checkpoint():
    net = nn.Sequential(rf.FusedResidual(6, 9, True, 2), rf.FusedResidual(9, 9))
    randomize(net).eval()
    direct = gradients(net, images())
    checkpoint = torch.utils.checkpoint.checkpoint

    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    for ours, want in zip(gradients(Saving(), images()), direct, strict=True):
        assert_same(ours, want)


@pytest.mark.parametrize("name", PAIRS)
def test_editing_a_weight_between_forward_and_backward(name):
    """Eager refuses; ours must not return gradients of something else."""
    fused, _ = pair(name, training=False)
    y = fused(images())
    with torch.no_grad():
        for p in fused.parameters():
            p.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_for_3d_and_for_no_images(name):
    fused, plain = pair(name, training=False)
    x = images(batch=1)[0].requires_grad_()
    fused(x).sum().backward()
    want = images(batch=1).requires_grad_()
    plain(want).sum().backward()
    torch.testing.assert_close(x.grad, want.grad[0], rtol=1e-4, atol=1e-4)
    none = images(batch=0).requires_grad_()
    fused.zero_grad()
    fused(none).sum().backward()
    assert none.grad.shape == none.shape
    assert all(not p.grad.any() for p in fused.parameters())


def test_training_learns_the_same_with_fused_blocks():
    """A whole loop: train and evaluate a net of fused blocks next to the plain one."""
    nets = []
    for block in (rf.FusedResidual, Residual):
        torch.manual_seed(1)
        stem = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        blocks = [block(8, 8), block(8, 12, use_1x1conv=True, strides=2)]
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)]
        nets.append(nn.Sequential(stem, *blocks, *tail))
    losses = []
    for net in nets:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        history = []
        for step in range(5):
            net.train()
            x, y = images(seed=step, batch=8), torch.arange(8) % 3
            loss = nn.functional.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == losses[1]
    with torch.no_grad():
        a, b = (net.eval()(images(seed=50)) for net in nets)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


NARROW = """
import torch
from conftest import randomize
from torchvision_style import BasicBlock, ResNet
import resnet_fused as rf
torch.set_num_threads(1)
torch.manual_seed(0)
for width in (1, 4):
    for layout in (torch.contiguous_format, torch.channels_last):
        net = randomize(ResNet(BasicBlock, [1, 1, 1, 1], width=width)).eval()
        net = rf.fuse(net.to(memory_format=layout))
        for _ in range(20):
            net(torch.randn(3, 3, 40, 37, requires_grad=True)).sin().sum().backward()
print("whole")
"""


def test_gradients_of_narrow_convolutions_break_nothing():
    """PyTorch's own kernel for 1x1 ones in channels_last writes beyond its memory."""
    tests = str(Path(__file__).parent)
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), tests])
    done = subprocess.run(
        [sys.executable, "-c", NARROW],
        env={**os.environ, "MALLOC_PERTURB_": "128", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-2000:]
