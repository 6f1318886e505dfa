"""add_relu against the definition: every instruction set, dtype, layout and length."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    KERNEL_DTYPES,
    LAYOUTS,
    NAN,
    assert_same,
    needs_extension,
    poison,
)

import resnet_fused as rf

INF = float("inf")


def definition(a, b):
    """relu(a + b): the sum in float64, rounded once."""
    return (a.double() + b.double()).clamp_min(0.0).to(a.dtype)


def add_relu(a, b):
    poison(a.numel() * a.element_size())
    return rf.ops.add_relu(a, b)


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("length", [*range(1, 36), 63, 64, 65, 127, 1000, 1023])
def test_every_length(length, isa, dtype):
    a, b = draw(length, dtype=dtype), draw(length, dtype=dtype)
    assert_same(add_relu(a, b), definition(a, b))


@pytest.mark.threads
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("length", [16_383, 16_384, 16_385, 100_003])
def test_several_threads(count, length, dtype, threads):
    threads(count)
    a, b = draw(length, dtype=dtype), draw(length, dtype=dtype)
    assert_same(add_relu(a, b), definition(a, b))


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_layouts(a_layout, b_layout, dtype):
    """b's layout does not matter, a's decides the output's."""
    a = LAYOUTS[a_layout](draw(2, 5, 4, 3, dtype=dtype))
    b = LAYOUTS[b_layout](draw(2, 5, 4, 3, dtype=dtype))
    y = add_relu(a, b)
    assert_same(y, definition(a, b))
    assert y.stride() == torch.empty_like(a).stride()
    for t in (a, b):
        assert y.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


SHAPES = [(), (1,), (7,), (3, 4), (2, 3, 4), (1, 1, 1, 1), (2, 1, 3, 1), (2, 3, 2, 3, 2)]
EMPTY = [(0,), (0, 5), (4, 0, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_any_number_of_dimensions(shape, dtype):
    a, b = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    y = add_relu(a, b)
    assert_same(y, definition(a, b))
    assert y.stride() == torch.empty_like(a).stride()


def test_whole_numbers_are_exact(isa, dtype):
    a = torch.randint(-1000, 1000, (999,)).to(dtype)
    b = torch.randint(-1000, 1000, (999,)).to(dtype)
    assert_same(add_relu(a, b), definition(a, b))


def test_nan_and_infinity(isa, dtype):
    """NaN passes, also where infinities cancel; -inf becomes 0."""
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 65504.0, -65504.0], dtype=dtype)
    a, b = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    for padding in range(17):  # at every place of a vector
        head = torch.zeros(padding, dtype=dtype)
        y = add_relu(torch.cat([head, a]), torch.cat([head, b]))[padding:]
        assert_same(y, definition(a, b))
    want_nan = a.isnan() | b.isnan() | (a.double() + b.double()).isnan()
    assert torch.equal(y.isnan(), want_nan)


@needs_extension
@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:])
def test_16_bit_sums_are_rounded_once(dtype, isa):
    bits = torch.randint(-(2**15), 2**15, (2, 50_000)).to(torch.int16).view(dtype)
    a, b = bits[0], bits[1]
    want = (a.float() + b.float()).clamp_min(0).to(dtype)
    assert_same(add_relu(a, b), want)


def test_a_tensor_and_itself(dtype):
    a = draw(2, 3, 4, 5, dtype=dtype)
    assert_same(add_relu(a, a), definition(a, a))


@pytest.mark.parametrize("lazy", ["a", "b", "both"])
def test_negative_views_are_resolved(lazy):
    a, b = draw(3, 4), draw(3, 4)
    left = torch._neg_view(a) if lazy != "b" else a
    right = torch._neg_view(b) if lazy != "a" else b
    want = definition(-a if lazy != "b" else a, -b if lazy != "a" else b)
    assert_same(add_relu(left, right), want)


def test_gradients(dtype):
    """As relu(a + b) in PyTorch: 0 where the sum is not positive."""
    a, b = draw(3, 7, dtype=dtype), draw(3, 7, dtype=dtype)
    b[0] = -a[0]
    theirs = [t.clone().requires_grad_() for t in (a, b)]
    ours = [t.clone().requires_grad_() for t in (a, b)]
    weights = draw(3, 7, dtype=dtype)
    (torch.relu(theirs[0] + theirs[1]) * weights).sum().backward()
    (rf.ops.add_relu(*ours) * weights).sum().backward()
    for t, o in zip(theirs, ours, strict=True):
        assert_same(o.grad, t.grad)


def test_gradcheck():
    a, b = (torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(rf.ops.add_relu, (a, b))
    assert torch.autograd.gradgradcheck(rf.ops.add_relu, (a, b))


def test_gradient_for_one_operand_only():
    a, b = draw(5), draw(5)
    for needs in (0, 1):
        pair = [a.clone(), b.clone()]
        pair[needs].requires_grad_()
        rf.ops.add_relu(*pair).sum().backward()
        assert_same(pair[needs].grad, (a + b > 0).float())
        assert pair[1 - needs].grad is None
