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
    assert_same,
    assert_whole,
    eager,
    exact,
    float32_bound,
    fused,
    integers,
    is_dense_channels_last,
    normals,
    use_isa,
)
from hypothesis import assume, given
from hypothesis import strategies as st

import resnet_fused as rf
from resnet_fused.check import PLAN_TRAITS


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
        stride=draw(st.one_of(st.sampled_from([(1, 1), (2, 2)]), pairs(1, 3))),
        padding=draw(st.one_of(st.just((1, 1)), pairs(0, 4))),
        dilation=draw(st.one_of(st.just((1, 1)), pairs(1, 3))),
        groups=groups,
        act=draw(st.sampled_from(["relu", "none"])),
        residual=draw(st.booleans()),
    )
    assume(min(case.y_shape[-2:]) >= 1)
    return case


layouts = st.sampled_from(sorted(LAYOUTS))


@st.composite
def plans(draw, case, dtype):
    """One of all that can compute it on this instruction set."""
    return draw(st.sampled_from(case.plans(dtype)))


@given(cases(), st.sampled_from(DTYPES), layouts, layouts, st.sampled_from(ISAS), st.data())
def test_whole_numbers(case, dtype, x_layout, residual_layout, isa, data):
    use_isa(isa)
    o = integers(case).to(dtype).laid_out(x_layout, residual_layout)
    plan = data.draw(plans(case, dtype))
    got = fused(o, case, plan)
    assert_whole(got, exact(o, case), plan, case)
    assert is_dense_channels_last(got)


@given(cases(), st.sampled_from(DTYPES), layouts, st.sampled_from(ISAS), st.data())
def test_errors_are_eagers(case, dtype, layout, isa, data):
    assume(case.n != 0)
    use_isa(isa)
    o = normals(case).to(dtype).laid_out(layout)
    plan = data.draw(plans(case, dtype))
    # The largest error of few outputs may lie far above the bound of their norm.
    allowed = 4 * float32_bound(plan) if PLAN_TRAITS[plan].spreads else 2e-6
    assert_close_as_eager(fused(o, case, plan), eager(o, case), exact(o, case), allowed)


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
