"""Any convolution there is: shapes, layouts and plans drawn by hypothesis."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    DTYPES,
    ISAS,
    LAYOUTS,
    Case,
    assert_close_as_eager,
    assert_nearly_whole,
    assert_same,
    eager,
    exact,
    fused,
    integers,
    is_dense_channels_last,
    normals,
    use_isa,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import resnet_fused as rf


@pytest.fixture(autouse=True)
def usual_isa_afterwards(one_thread):
    yield
    use_isa("")


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def cases(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    per_group = st.one_of(st.integers(1, 9), st.integers(10, 70), st.sampled_from([16, 32, 48, 64]))
    c, k = (draw(per_group) * groups for _ in range(2))
    assume(c * k <= 6000)
    case = Case(
        n=draw(st.sampled_from([None, 0, 1, 1, 2, 3])),
        c=c,
        h=draw(st.integers(1, 12)),
        w=draw(st.integers(1, 12)),
        k=k,
        kernel=draw(st.one_of(st.sampled_from([(1, 1), (3, 3), (3, 3)]), pairs(1, 5))),
        stride=draw(st.one_of(st.just((1, 1)), pairs(1, 3))),
        padding=draw(st.one_of(st.just((1, 1)), pairs(0, 4))),
        dilation=draw(st.one_of(st.just((1, 1)), pairs(1, 3))),
        groups=groups,
        act=draw(st.sampled_from(["relu", "none"])),
        residual=draw(st.booleans()),
    )
    assume(min(case.y_shape[-2:]) >= 1)
    return case


layouts = st.sampled_from(sorted(LAYOUTS))
words = st.sampled_from(["ours", "winograd4", "winograd2", "torch"])


@given(cases(), st.sampled_from(DTYPES), layouts, layouts, words, st.sampled_from(ISAS))
def test_whole_numbers(case, dtype, x_layout, residual_layout, word, isa):
    use_isa(isa)
    o = integers(case).to(dtype).laid_out(x_layout, residual_layout)
    got, want = fused(o, case, word), exact(o, case)
    if word == "winograd4":
        assert got.dtype == dtype
        assert_nearly_whole(got, want, 0.1)
    else:
        assert_same(got, want.to(dtype))
    assert is_dense_channels_last(got)


@given(cases(), st.sampled_from(DTYPES), layouts, words, st.sampled_from(ISAS))
def test_errors_are_eagers(case, dtype, layout, word, isa):
    assume(case.n != 0)
    use_isa(isa)
    o = normals(case).to(dtype).laid_out(layout)
    allowed = 8e-6 if word == "winograd4" else 2e-6
    assert_close_as_eager(fused(o, case, word), eager(o, case), exact(o, case), allowed)


@given(cases(), st.data())
def test_one_wrong_size_is_a_sentence(case, data):
    """Any operand with one size changed: ValueError that names an operand, never a result."""
    o = integers(case).to(torch.float32)
    names = ["weight", "scale", "shift"] + (["residual"] if case.residual else [])
    name = data.draw(st.sampled_from(names))
    t = getattr(o, name)
    dim = data.draw(st.integers(0, t.dim() - 1))
    size = data.draw(st.integers(0, 2 * t.shape[dim] + 1).filter(lambda n: n != t.shape[dim]))
    shape = list(t.shape)
    shape[dim] = size
    # A kernel of another size is a right one where no residual fixes the output's.
    assume(not (name == "weight" and dim >= 2))
    setattr(o, name, torch.ones(shape))
    with pytest.raises(ValueError, match=r"^conv_bn_act: \w+ must "):
        rf.ops.conv_bn_act(*o.args(), **case.keywords)


@given(
    st.lists(st.integers(0, 6), max_size=5),
    st.permutations(range(5)),
    st.permutations(range(5)),
    st.sampled_from(DTYPES),
    st.sampled_from(ISAS),
)
def test_add_relu_in_any_order_of_dimensions(shape, a_order, b_order, dtype, isa):
    use_isa(isa)
    operands = []
    for order in (a_order, b_order):
        order = [d for d in order if d < len(shape)]
        values = torch.randn([shape[d] for d in order]).to(dtype)
        operands.append(values.permute([order.index(d) for d in range(len(shape))]))
    a, b = operands
    y = rf.ops.add_relu(a, b)
    assert_same(y, (a.double() + b.double()).clamp_min(0).to(dtype))
    if y.numel():
        assert y.stride() == torch.empty_like(a).stride()
