"""torch.func and forward-mode differentiation run PyTorch's own operations; torch.fx keeps ours."""

from __future__ import annotations

import pytest
import torch
from conftest import randomize
from torch import func
from torch.autograd import forward_ad
from torchvision_style import BasicBlock, Bottleneck, ResNet

import resnet_fused as rf

KEYWORDS = {"stride": 2, "padding": 1, "act": "relu"}


def conv(op):
    """A fused convolution of x alone."""
    g = torch.Generator().manual_seed(5)
    weight, scale, shift = (torch.randn(*s, generator=g) for s in ((6, 4, 3, 3), (6,), (6,)))
    return lambda x: op(x, weight, scale, shift, **KEYWORDS)


def add_relu(op):
    return lambda x: op(x, x.flip(-1))


def block(fuse):
    torch.manual_seed(0)
    plain = randomize(rf.reference.Residual(4, 6, use_1x1conv=True, strides=2)).eval()
    return rf.fuse(plain) if fuse else plain


PAIRS = {
    "conv_bn_act": (conv(rf.ops.conv_bn_act), conv(rf.reference.conv_bn_act)),
    "add_relu": (add_relu(rf.ops.add_relu), add_relu(rf.reference.add_relu)),
    "module": (block(True), block(False)),
}
TRANSFORMS = {
    "grad": lambda f: func.grad(lambda x: f(x).square().sum()),
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (x.sin(),)),
    "vjp": lambda f: lambda x: func.vjp(f, x)[1](f(x)),
    "vmap": lambda f: lambda x: func.vmap(f)(torch.stack([x, -x])),
    "hessian": lambda f: lambda x: func.hessian(lambda s: f(s * x).square().sum())(torch.ones(())),
}


@pytest.fixture
def x():
    return torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", PAIRS)
def test_function_transforms(name, transform, x):
    ours, plain = (TRANSFORMS[transform](f)(x) for f in PAIRS[name])
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_dual_numbers(name, grad, x):
    """Without gradients an op of ours would drop the tangent, and nobody would notice."""
    ours, plain = PAIRS[name]
    with torch.no_grad():
        ours(x)  # leaves a prepared call behind
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.cos())
        for got, want in zip(
            *(forward_ad.unpack_dual(f(dual)) for f in (ours, plain)), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_symbolic_trace_takes_fused_modules_for_layers(kind):
    torch.manual_seed(0)
    plain = randomize(ResNet(kind, [1, 1, 1, 1], width=8)).eval()
    fused = rf.fuse(plain)
    traced = torch.fx.symbolic_trace(fused)
    image = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(traced(image), plain(image), rtol=1e-4, atol=1e-4)
    assert list(traced.state_dict()) == list(plain.state_dict())
    assert all(row.fused for row in rf.report(traced) if row.kind != "conv_bn")
