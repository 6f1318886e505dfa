"""pack_conv and conv_bn_act_packed: layouts, copies, weights that were packed for another plan."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from conftest import (
    DTYPES,
    ISAS,
    PLAN_DTYPES,
    Case,
    assert_same,
    assert_whole,
    exact,
    fused,
    integers,
    is_dense_channels_last,
    needs_extension,
    runs_here,
)
from winograd_algorithms import algorithm

import resnet_fused as rf
from resnet_fused.check import CPU_PLANS, PLAN_TRAITS
from resnet_fused.ops import _shapes

pytestmark = pytest.mark.usefixtures("one_thread")
_ops = torch.ops.resnet_fused

DIRECT = [plan for plan in CPU_PLANS if plan.startswith("direct")]
WINOGRAD = [plan for plan in CPU_PLANS if algorithm(plan) and not plan.endswith("_raw")]

# 33 output channels need a second panel; 31, 17 and 3 input channels leave half a pair.
DENSE = Case(2, 31, 5, 5, 33, (3, 3), padding=(1, 1))
CASES = [
    DENSE,
    Case(1, 34, 5, 5, 66, (3, 3), padding=(1, 1), groups=2),
    Case(1, 528, 4, 4, 33, (1, 1)),
    Case(None, 3, 6, 5, 7, (3, 3), padding=(1, 1)),
]


def packed_dtype(plan):
    return torch.bfloat16 if plan.endswith("_bf16") else torch.float32


def run(o, packed, case, plan):
    keywords = case.keywords | {"kernel_size": case.kernel, "plan": plan}
    return _ops.conv_bn_act_packed(o.x, packed, *o.args()[2:], **keywords)


@pytest.mark.parametrize(("plan", "dtype"), PLAN_DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weights_give_the_same(case, plan, dtype):
    """pack_conv once, conv_bn_act_packed often: the same bits as conv_bn_act in one go."""
    case = case.fitted(plan)
    o = integers(case).to(dtype)
    packed = rf.ops.pack_conv(o.weight, case.groups, plan=plan)
    want = fused(o, case, plan)
    for _ in range(2):
        got = run(o, packed, case, plan)
        assert_same(got, want)
        assert is_dense_channels_last(got)


@pytest.mark.parametrize(("plan", "dtype"), PLAN_DTYPES)
def test_packed_weight_is_a_copy(plan, dtype):
    side = PLAN_TRAITS[plan].kernel or 3
    for channels in ((32, 16), (1, 1), (32, 1)):
        weight = torch.ones(*channels, side, side, dtype=dtype)
        packed = rf.ops.pack_conv(weight, plan=plan)
        before = packed.clone()
        weight.fill_(7)
        assert_same(packed, before)


# ---- layouts -------------------------------------------------------------------------------------


def in_words(values, pack):
    """(..., elements, 32) -> (..., words, 32), or (..., words, 32, 2) where words are pairs."""
    if pack == 1:
        return values
    *rest, elements, panel = values.shape
    padded = values.new_zeros(*rest, -(-elements // 2) * 2, panel)
    padded[..., :elements, :] = values
    return padded.view(*rest, -1, 2, panel).transpose(-1, -2)


@needs_extension
@pytest.mark.parametrize("plan", DIRECT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_of_direct(case, plan):
    """packed[group][panel][tap][word of the channels][32], padded with zeros."""
    dtype = packed_dtype(plan)
    weight = integers(case).weight.to(dtype)
    packed = rf.ops.pack_conv(weight, case.groups, plan=plan)
    per_group, taps = case.k // case.groups, case.kernel[0] * case.kernel[1]
    panels = -(-per_group // 32)
    want = torch.zeros(case.groups, panels * 32, taps, case.c // case.groups, dtype=dtype)
    want[:, :per_group] = weight.view(case.groups, per_group, -1, taps).transpose(2, 3)
    want = want.view(case.groups * panels, 32, taps, -1).permute(0, 2, 3, 1)
    want = in_words(want, 4 // dtype.itemsize)
    assert_same(packed, want.reshape(want.shape[0], -1, *want.shape[3:]))


@needs_extension
@pytest.mark.parametrize("plan", WINOGRAD)
@pytest.mark.parametrize("case", [DENSE, CASES[3]], ids=str)
def test_layout_of_winograd(case, plan):
    """packed[panel][product][word of the channels][32] of G w G^T, computed in float64."""
    dtype = packed_dtype(plan)
    weight = integers(case).weight
    packed = rf.ops.pack_conv(weight.to(dtype), plan=plan)
    g = algorithm(plan).weight_transform()
    panels, products = -(-case.k // 32), algorithm(plan).products
    want = torch.zeros(panels * 32, case.c, products, products, dtype=torch.float64)
    want[: case.k] = g @ weight @ g.T
    want = want.view(panels, 32, case.c, products**2).permute(0, 3, 2, 1)
    want = in_words(want.float().to(dtype), 4 // dtype.itemsize)
    # Nothing but the order of the float64 products may differ: one rounding, and no zero is lost.
    torch.testing.assert_close(packed, want, rtol=torch.finfo(dtype).eps, atol=0)


@needs_extension
@pytest.mark.parametrize("case", [DENSE, CASES[3]], ids=str)
def test_layout_of_raw_winograd(case):
    """packed[panel][channel][tap][32] of the kernels as they are."""
    weight = integers(case).weight.float()
    panels = -(-case.k // 32)
    want = torch.zeros(panels * 32, case.c, 9)
    want[: case.k] = weight.view(case.k, case.c, 9)
    want = want.view(panels, 32, case.c, 9).permute(0, 2, 3, 1)
    assert_same(rf.ops.pack_conv(weight, plan="winograd4_raw"), want)


@needs_extension
@pytest.mark.parametrize("plan", CPU_PLANS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_python_and_kernels_know_the_same_shapes(case, plan):
    case = case.fitted(plan)
    for dtype in PLAN_TRAITS[plan].dtypes:
        weight = torch.ones(case.weight_shape, dtype=dtype)
        packed = rf.ops.pack_conv(weight, case.groups, plan=plan)
        assert packed.shape == _shapes.packed_shape(case.weight_shape, case.groups, plan)
        assert packed.dtype == (dtype if plan == "torch" else packed_dtype(plan))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_packed_weights_serve_every_instruction_set(dtype):
    """Packed on one, run on another: the layout does not depend on the instruction set."""
    for plan in CPU_PLANS:
        if dtype not in PLAN_TRAITS[plan].dtypes:
            continue
        case = DENSE.fitted(plan)
        o = integers(case).to(dtype)
        packed = []
        for isa in ISAS:
            try:
                _ops.set_cpu_isa(isa)
                assert rf.ops.cpu_isa() == isa
                packed.append(rf.ops.pack_conv(o.weight, plan=plan))
                assert_same(packed[0], packed[-1], f"({plan}, {isa})")
                if runs_here(plan):
                    got = run(o, packed[0], case, plan)
                    assert_whole(got, exact(o, case), plan, case, isa)
            finally:
                _ops.set_cpu_isa("")


# ---- weights of another plan ---------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize(("packed_for", "plan"), list(permutations(CPU_PLANS, 2)))
def test_weights_of_another_plan_are_refused(packed_for, plan):
    """No two plans' layouts of one weight can be confused: their shapes tell them apart."""
    case = DENSE.fitted(plan)
    dtype = PLAN_TRAITS[plan].dtypes[0]
    o = integers(case).to(dtype)
    weight = integers(DENSE.fitted(packed_for)).weight
    packed = rf.ops.pack_conv(weight.to(PLAN_TRAITS[packed_for].dtypes[0]), plan=packed_for)
    with pytest.raises(RuntimeError) as caught:
        run(o, packed, case, plan)
    want = _shapes.packed_shape(case.weight_shape, 1, plan)
    assert packed.shape != want
    sentence = f"packed must have shape {want}, got {tuple(packed.shape)}"
    assert str(caught.value) == f"conv_bn_act_packed: {sentence}"
