"""Plans that multiply bfloat16 in pairs: odd channel counts, exact range, subnormals, errors.

They need avx512_bf16; what they refuse elsewhere is tested on every machine.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from conftest import (
    ISAS,
    Case,
    assert_same,
    assert_whole,
    dirty_arena,
    eager,
    exact,
    fused,
    integers,
    needs_extension,
    normals,
    use_isa,
)
from winograd_algorithms import algorithm

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.check import CPU_PLANS, PLAN_TRAITS

pytestmark = [needs_extension, pytest.mark.usefixtures("one_thread")]
_ops = torch.ops.resnet_fused
BF16 = torch.bfloat16
ISA = "avx512bf16"
PAIRS = [plan for plan in CPU_PLANS if PLAN_TRAITS[plan].isa == ISA]
ONE, TWO = (1, 1), (2, 2)

needs_bf16 = pytest.mark.skipif(ISA not in ISAS, reason="this CPU has no avx512_bf16")


@pytest.fixture
def bf16_isa():
    use_isa(ISA)
    yield
    use_isa("")


def one_case(plan, c=17, h=6, w=7, k=33, **rest):
    return Case(1, c, h, w, k, (3, 3), padding=ONE, **rest).fitted(plan)


def test_there_are_such_plans():
    assert {plan for plan in CPU_PLANS if plan.endswith("_bf16")} == set(PAIRS)
    for plan in PAIRS:
        assert PLAN_TRAITS[plan].dtypes == (BF16,)


# ---- pairs ---------------------------------------------------------------------------------------

# Every kernel, also those that only the direct kernel takes: pairs must not reach over a tap, a
# group or the last channel.
KERNELS = [
    Case(2, 1, 6, 7, 20, (1, 1)),
    Case(1, 1, 6, 7, 20, (1, 1), stride=TWO),
    Case(2, 1, 6, 7, 20, (3, 3), padding=ONE),
    Case(2, 1, 6, 7, 20, (3, 3), padding=ONE, stride=TWO),
    Case(1, 1, 6, 7, 20, (3, 3), padding=TWO, dilation=TWO),
    Case(1, 1, 6, 7, 20, (3, 2), padding=(1, 0), dilation=(1, 3)),
    Case(1, 1, 9, 11, 20, (7, 7), padding=(3, 3), stride=TWO),
    Case(None, 1, 5, 6, 20, (5, 4), padding=(2, 2)),
]


@needs_bf16
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("c", [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 65])
def test_any_number_of_channels(c, groups, bf16_isa):
    dirty_arena()
    for kernel in KERNELS:
        case = kernel.but(c=c * groups, k=20 * groups, groups=groups)
        o = integers(case)
        want = exact(o, case)
        o = o.to(BF16)
        for plan in case.plans(BF16):
            if plan in PAIRS:
                assert_whole(fused(o, case, plan), want, plan, case)


@needs_bf16
@pytest.mark.parametrize("plan", PAIRS)
def test_nothing_leaks_into_the_odd_half_of_a_pair(plan, bf16_isa):
    """The last pair's missing half lies on the next pixel's first channel: NaN must not get in."""
    case = one_case(plan, c=5, residual=False, act="none")
    o = integers(case).to(BF16)
    first = algorithm(plan).out if algorithm(plan) else 2  # output that sees nothing of column 0
    o.x[..., 0] = float("nan")
    x = o.x.contiguous(memory_format=torch.channels_last)
    with select.forced(plan):
        got = rf.ops.conv_bn_act(x, *o.args()[1:], **case.keywords)
    o.x[..., 0] = 0
    want = exact(o, case)
    assert got[..., 0].isnan().all()
    assert_same(got[..., first:], want[..., first:].to(BF16))


# ---- what is exact -------------------------------------------------------------------------------

# The largest |x| and |weight| whose transforms are whole multiples of a power of two of at most 8
# bits: both 1-D transforms of x double it at most; those of weight give up to 3 w / 2 (stride 2:
# w), in halves.
EXACT = {"direct_bf16": (256, 256), "winograd2_bf16": (64, 28), "winograd2s2_bf16": (64, 64)}


@needs_bf16
@pytest.mark.parametrize("plan", PAIRS)
def test_exact_range(plan, bf16_isa):
    """Nothing is rounded before the sum is complete."""
    for seed, c in product(range(4), (1, 6, 9)):
        case = one_case(plan, c=c, residual=False, act="none")
        o = integers(case)
        g = torch.Generator().manual_seed(seed)
        largest_x, largest_w = EXACT[plan]
        o.x = torch.randint(-largest_x, largest_x + 1, case.x_shape, generator=g).double()
        o.weight = torch.randint(-largest_w, largest_w + 1, case.weight_shape, generator=g).double()
        o.scale.fill_(1)
        o.shift.zero_()
        assert_same(fused(o.to(BF16), case, plan), exact(o, case).to(BF16), f"({c} channels)")


@needs_bf16
@pytest.mark.parametrize("plan", [plan for plan in PAIRS if algorithm(plan)])
def test_transformed_windows_and_weights_are_rounded(plan, bf16_isa):
    """These plans multiply bfloat16, not float32: beyond the exact range they are not exact."""
    case = one_case(plan, c=9, residual=False, act="none")
    g = torch.Generator().manual_seed(0)
    for name, shape in (("x", case.x_shape), ("weight", case.weight_shape)):
        o = integers(case)
        o.scale.fill_(1)
        o.shift.zero_()
        setattr(o, name, torch.randint(128, 256, shape, generator=g).double())
        assert (fused(o.to(BF16), case, plan).double() - exact(o, case)).abs().max() > 2


@needs_bf16
@pytest.mark.parametrize("plan", PAIRS)
def test_tiny_numbers_become_zero_at_worst(plan, bf16_isa):
    """Subnormal operands count as zero, and so do subnormal products; nothing else is lost."""
    case = one_case(plan, residual=False, act="none")
    o = normals(case)
    o.weight, o.scale, o.shift = o.weight.sign(), o.scale.sign(), o.shift * 0
    terms = 9 * case.c
    smallest = torch.finfo(BF16).smallest_normal
    for exponent in range(-133, -100, 3):
        scaled = normals(case).x * 2.0**exponent
        o.x = scaled.to(BF16).double()
        got = fused(o.to(BF16), case, plan).double()
        want = exact(o, case)
        # Transforms take up to 4 operands together and halve weights twice: 16 units a term.
        assert ((got - want).abs() <= 16 * smallest * terms + 0.02 * want.abs().max()).all()
        if exponent < -129:
            assert (got == 0).all()


# ---- errors --------------------------------------------------------------------------------------


# Relative L2 error of one convolution without residual and shift, a tenth above what was measured.
# direct_bf16 rounds its result only: half a unit of bfloat16 is 0.0039, its mean over all values
# 0.0017. Winograd rounds windows and weights too.
ERRORS = {"direct_bf16": 1.85e-3, "winograd2_bf16": 4.7e-3, "winograd2s2_bf16": 3.7e-3}


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@needs_bf16
@pytest.mark.parametrize("rectified", [False, True], ids=["normal", "relu"])
@pytest.mark.parametrize("channels", [3, 64, 256, 512])
def test_error_of_one_convolution(channels, rectified, bf16_isa):
    """Within the table's bound, and at most twice eager's."""
    for seed, stride in product(range(3), (ONE, TWO)):
        case = Case(1, channels, 21, 22, 64, (3, 3), stride, ONE, residual=False, act="none")
        o = normals(case, seed).to(BF16)
        o.shift.zero_()
        o.x = o.x.clamp_min(0) if rectified else o.x
        want = exact(o, case)
        theirs = relative(eager(o, case), want)
        for plan in case.plans(BF16):
            if plan in PAIRS:
                ours = relative(fused(o, case, plan), want)
                assert ours <= min(ERRORS[plan], 2 * theirs), plan


# ---- where they cannot run -----------------------------------------------------------------------


@pytest.mark.parametrize("plan", PAIRS)
def test_refused_on_other_instruction_sets(plan, isa):
    """One sentence, whatever the machine: weights can be packed anywhere, but not multiplied."""
    case = one_case(plan)
    o = integers(case).to(BF16)
    packed = rf.ops.pack_conv(o.weight, plan=plan)
    keywords = case.keywords | {"kernel_size": case.kernel, "plan": plan}
    if isa == ISA:
        got = _ops.conv_bn_act_packed(o.x, packed, *o.args()[2:], **keywords)
        assert_whole(got, exact(o, case), plan, case)
        return
    with pytest.raises(RuntimeError) as caught:
        _ops.conv_bn_act_packed(o.x, packed, *o.args()[2:], **keywords)
    sentence = f'plan "{plan}" needs avx512_bf16, the kernels in use are {isa}'
    assert str(caught.value) == f"conv_bn_act_packed: {sentence}"


@pytest.mark.parametrize("word", ["none", "ours", *PAIRS])
def test_never_chosen_on_other_instruction_sets(word, isa):
    """Not by the rule and not by force, whose plan then gives way to the direct kernel."""
    for kernel, stride, size, batch in product((1, 3), (1, 2), (1, 7, 56), (1, 32)):
        shape = select.ConvShape(
            *("cpu", BF16, 64, 64, (kernel, kernel), (size, size), (stride, stride)), batch=batch
        )
        with select.forced(word):
            choice = select.choose(shape)
        assert choice.plan not in PAIRS or isa == ISA
        if word in PAIRS and isa != ISA:
            assert choice.plan == "direct"
