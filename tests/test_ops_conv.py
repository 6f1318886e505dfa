"""conv_bn_act against the float64 oracle: every instruction set, plan, dtype, layout and geometry.

Whole numbers are compared exactly, so that one wrong tap, channel, pixel or rounding shows; normal
numbers are compared with the error that eager PyTorch makes in the same dtype. What only Winograd
kernels or products of bfloat16 can get wrong is in test_ops_winograd and test_ops_bf16.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import (
    DTYPES,
    KERNEL_DTYPES,
    LAYOUTS,
    PLAN_DTYPES,
    SLACK,
    Case,
    assert_close_as_eager,
    assert_same,
    assert_whole,
    dirty_arena,
    eager,
    exact,
    float32_bound,
    fused,
    integers,
    is_dense_channels_last,
    needs_extension,
    normals,
    resident_bytes,
)

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.check import PLAN_TRAITS

pytestmark = pytest.mark.usefixtures("one_thread")
_ops = torch.ops.resnet_fused
ONE, TWO, THREE = (1, 1), (2, 2), (3, 3)


def square(n, c, size, k, kernel=3, **rest):
    return Case(n, c, size, size, k, (kernel, kernel), **rest)


# ResNet's convolutions: 3x3 and 1x1 at strides 1 and 2, the 7x7 stem, the lesson's gray stem.
RESNET = [
    square(1, 64, 14, 64, padding=ONE),
    square(2, 64, 9, 128, stride=TWO, padding=ONE),
    square(1, 64, 8, 128, 1, stride=TWO, residual=False, act="none"),
    square(1, 128, 7, 32, 1),
    square(1, 3, 29, 64, 7, stride=TWO, padding=THREE, residual=False),
    square(2, 1, 20, 48, 7, stride=TWO, padding=THREE),
    square(1, 512, 2, 100, padding=ONE),
]

# Channels around the sizes of vectors (4, 8, 16), chunks (16) and panels (32).
CHANNELS = [
    square(2, c, 5, k, padding=ONE)
    for c, k in [
        *((1, 1), (1, 5), (3, 3), (3, 64), (5, 17), (17, 31), (31, 32), (32, 33), (33, 48)),
        *((48, 100), (100, 1), (16, 16), (96, 65), (130, 15), (15, 130)),
    ]
]

# Reductions around the slice of 512: whole chunks of 16 channels and any number of channels.
REDUCTIONS = [
    *(square(1, c, 4, 33, 1) for c in (496, 512, 528, 1024, 1040)),
    *(square(1, c, 4, 33, 1) for c in (511, 513, 515, 1023, 1025, 1037)),
    *(square(1, c, 4, 40, padding=ONE) for c in (48, 57, 63, 64, 100, 112, 113, 115, 128)),
    *(square(1, c, 5, 20, 5, padding=TWO) for c in (17, 20, 21, 32, 41, 48)),
    *(square(1, c, 8, 9, 7, stride=TWO, padding=THREE) for c in (10, 11, 16, 17)),
    Case(1, 80, 5, 5, 12, (2, 4), padding=(1, 2)),
    Case(1, 27, 5, 5, 12, (4, 5), padding=(1, 2)),
]

# Kernels, strides, paddings and dilations; height and width never the same.
GEOMETRIES = [
    *(
        Case(2, c, 7, 9, 20, kernel, stride, padding, dilation)
        for c in (16, 5)
        for kernel, stride, padding, dilation in [
            ((1, 1), (1, 1), (0, 0), (1, 1)),
            ((1, 1), (3, 2), (0, 0), (1, 1)),
            ((1, 1), (1, 2), (2, 3), (1, 1)),
            ((2, 2), (1, 1), (0, 0), (1, 1)),
            ((2, 2), (2, 2), (1, 1), (1, 1)),
            ((1, 3), (1, 1), (0, 1), (1, 1)),
            ((3, 1), (2, 1), (1, 0), (1, 1)),
            ((3, 3), (1, 1), (0, 0), (1, 1)),
            ((3, 3), (2, 3), (1, 1), (1, 1)),
            ((3, 3), (1, 1), (2, 2), (2, 2)),
            ((3, 3), (2, 1), (0, 2), (1, 3)),
            ((3, 2), (1, 1), (1, 0), (2, 1)),
            ((3, 3), (1, 1), (4, 5), (1, 1)),
            ((5, 5), (1, 1), (2, 2), (1, 1)),
            ((5, 3), (2, 2), (2, 1), (1, 2)),
            ((7, 7), (2, 2), (3, 3), (1, 1)),
            ((7, 9), (1, 1), (0, 0), (1, 1)),
            ((9, 11), (1, 1), (1, 1), (1, 1)),
        ]
    ),
]

MAPS = [
    *(Case(n, 8, 1, 1, 8, (3, 3), padding=ONE) for n in (None, 1, 2, 3)),
    Case(1, 8, 1, 1, 8, (1, 1)),
    Case(1, 1, 1, 1, 1, (1, 1)),
    Case(2, 1, 1, 1, 1, (3, 3), padding=ONE),
    Case(1, 4, 1, 9, 6, (7, 7), padding=THREE),
    Case(1, 16, 9, 1, 6, (7, 7), padding=THREE),
    Case(1, 4, 2, 2, 6, (5, 5), padding=(4, 4)),
    Case(3, 16, 1, 3, 40, (3, 3), stride=TWO, padding=ONE),
    Case(None, 3, 6, 5, 7, (3, 3), padding=ONE),
    Case(None, 32, 6, 5, 32, (1, 1)),
    Case(7, 16, 4, 5, 16, (3, 3), padding=ONE),
    Case(1, 16, 15, 16, 16, (1, 1)),
    Case(1, 3, 23, 11, 8, (3, 3)),
]

GROUPS = [
    square(2, 8, 6, 8, groups=8, padding=ONE),
    square(1, 8, 6, 24, groups=8, padding=ONE),
    square(1, 32, 6, 32, groups=2, padding=ONE),
    square(1, 64, 5, 80, groups=2, stride=TWO, padding=ONE),
    square(1, 34, 5, 66, groups=2, padding=ONE),
    square(1, 12, 5, 20, groups=4, padding=ONE),
    square(1, 12, 5, 20, 1, groups=4),
    square(1, 96, 4, 99, 1, groups=3),
    square(2, 36, 6, 72, groups=3, padding=TWO, dilation=TWO),
    square(1, 128, 4, 68, 5, groups=2, padding=TWO),
    square(1, 66, 4, 70, groups=2, padding=ONE),
    Case(None, 6, 5, 7, 9, (3, 2), padding=(1, 0), groups=3),
]

CASES = RESNET + CHANNELS + REDUCTIONS + GEOMETRIES + MAPS + GROUPS


@cache
def oracle(case):
    operands = integers(case)
    return operands, exact(operands, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers(case, isa, threads):
    """Every geometry in every dtype by every plan, with and without residual and activation."""
    dirty_arena()
    for residual, act in ((True, "relu"), (False, "none"), (True, "none"), (False, "relu")):
        variant = case.but(residual=residual, act=act)
        operands, want = oracle(variant)
        for dtype in DTYPES:
            o = operands.to(dtype)
            for plan in case.plans(dtype):
                hint = f"({dtype}, residual={residual}, act={act})"
                got = fused(o, variant, plan)
                assert_whole(got, want, plan, case, hint)
                assert is_dense_channels_last(got), hint
    threads(2)
    o = operands.to(torch.float32)
    for plan in case.plans(torch.float32):
        assert_whole(fused(o, variant, plan), want, plan, case, "(2 threads)")


@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("case", [CHANNELS[8], RESNET[1], GEOMETRIES[25], GROUPS[4]], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES[:2])
def test_layouts(case, x_layout, dtype):
    """x and residual in every memory layout, next to NaN that must not leak in."""
    plain = integers(case)
    for residual_layout in LAYOUTS:
        moved = plain.to(dtype).laid_out(x_layout, residual_layout)
        want = exact(moved, case)
        for plan in case.plans(dtype):
            got = fused(moved, case, plan)
            assert_whole(got, want, plan, case, f"(residual {residual_layout})")
            assert is_dense_channels_last(got)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_layouts_of_3d(layout, dtype):
    case = Case(None, 17, 5, 6, 33, (3, 3), padding=ONE)
    moved = integers(case).to(dtype).laid_out(layout, layout)
    got = fused(moved, case)
    assert_same(got, exact(moved, case).to(dtype))
    assert is_dense_channels_last(got)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith("expanded")])
@pytest.mark.parametrize(("plan", "dtype"), PLAN_DTYPES)
def test_layouts_of_weight_scale_and_shift(layout, plan, dtype):
    case = square(2, 12, 5, 34, padding=ONE, groups=2).fitted(plan)
    o = integers(case).to(dtype)
    want = exact(o, case)
    o.weight = LAYOUTS[layout](o.weight)
    pair = torch.stack([o.scale, o.shift], dim=1)  # columns: stride 2
    o.scale, o.shift = pair.unbind(1)
    assert o.scale.stride() == (2,)
    assert_whole(fused(o, case, plan), want, plan, case)


@pytest.mark.parametrize(("plan", "dtype"), PLAN_DTYPES)
def test_one_scale_for_all_channels_may_be_expanded(plan, dtype):
    case = square(1, 5, 4, 9).fitted(plan)
    o = integers(case).to(dtype)
    o.scale, o.shift = o.scale[:1].expand(9), o.shift[:1].expand(9)
    assert_whole(fused(o, case, plan), exact(o, case), plan, case)


@needs_extension
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_every_tile_height(isa, dtype):
    """Each number of rows that a register tile can have, alone and behind others."""
    for pixels in range(1, 32):
        case = Case(1, 5, 1, pixels, 37, (1, 1))
        operands, want = oracle(case)
        for plan in case.plans(dtype):
            assert_whole(fused(operands.to(dtype), case, plan), want, plan, case)


@needs_extension
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_every_panel_width(isa, dtype):
    """Each number of output channels in a panel: partial vectors in the epilogue.

    The whole output is compared, so that a store beyond the last channel of a pixel shows too.
    """
    for k in range(1, 67):
        case = Case(1, 3, 1, 3, k, (1, 1))
        for residual in (True, False):
            variant = case.but(residual=residual)
            operands, want = oracle(variant)
            for plan in case.plans(dtype):
                assert_whole(fused(operands.to(dtype), variant, plan), want, plan, case)


@needs_extension
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_every_reduction_length(isa, dtype):
    """Chunks of 16 that are full, partial and one long, in both ways of gathering."""
    dirty_arena()
    for c in range(1, 50):
        case = Case(1, c, 2, 3, 7, (1, 2), padding=(0, 1))
        operands, want = oracle(case)
        for plan in case.plans(dtype):
            assert_whole(fused(operands.to(dtype), case, plan), want, plan, case)


@pytest.mark.threads
@needs_extension
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_every_way_to_cut_the_work(count, isa, threads):
    """Jobs by rows, by panels and by both: the thread count decides how many are wanted."""
    threads(count)
    dirty_arena()
    for case in (
        square(1, 64, 3, 260, padding=ONE),  # few pixels, many panels
        square(1, 128, 4, 96, 1),
        square(2, 16, 12, 40, padding=ONE),  # many pixels, few panels
        square(1, 20, 11, 130, padding=ONE, groups=2),
        square(1, 3, 31, 16, 5, stride=TWO),
        square(3, 20, 13, 300, padding=ONE),
        square(1, 128, 3, 300, padding=ONE),  # large weights: their panels are split, one block
        square(2, 96, 13, 140, padding=ONE),  # and several blocks of tiles
        square(1, 128, 5, 200, stride=TWO, padding=ONE),
        square(2, 96, 25, 140, stride=TWO, padding=ONE),
        square(3, 40, 13, 300, 1),  # rows that a thread keeps for the jobs of its next panels
        square(2, 64, 11, 260, 1, groups=2),
        square(1, 40, 9, 300, padding=ONE),
    ):
        operands, want = oracle(case)
        for dtype in (torch.float32, torch.bfloat16):
            for plan in case.plans(dtype):
                assert_whole(fused(operands.to(dtype), case, plan), want, plan, case)


FLOAT_CASES = [*RESNET, CHANNELS[4], CHANNELS[9], REDUCTIONS[9], REDUCTIONS[16], GEOMETRIES[9],
               GEOMETRIES[28], MAPS[0], GROUPS[2], GROUPS[4]]  # fmt: skip


@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_error_is_eagers(case, isa, dtype):
    """Error against float64 at most twice eager's in the same dtype.

    Or what a Winograd kernel may have, where eager is better by more than that.
    """
    for act in ("relu", "none"):
        variant = case.but(act=act)
        operands = normals(variant).to(dtype)
        theirs, oracle = eager(operands, variant), exact(operands, variant)
        for plan in case.plans(dtype):
            allowed = float32_bound(plan) if PLAN_TRAITS[plan].spreads else 0
            assert_close_as_eager(fused(operands, variant, plan), theirs, oracle, allowed)


@needs_extension
@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:])
def test_16_bit_results_are_rounded_once(dtype, isa):
    """Ties to even, subnormals, overflow to infinity: each result is the nearest 16-bit number.

    A convolution of zeros leaves shift. Plans with products of bfloat16 round by vcvtneps2bf16, for
    which subnormal numbers are zero, as they are for the products.
    """
    bits = torch.randint(0, 2**16, (40_000,)).to(torch.int32)
    bits = (bits << 16) | torch.randint(0, 2**16, (40_000,)).to(torch.int32)
    halfway = (torch.arange(2**15, dtype=torch.int32) << 16) | 0x8000  # ties of bfloat16
    tiny = torch.arange(-3000, 3000) * 2.0**-26  # fp16 subnormals, their ties and quarter points
    edge = torch.linspace(65472, 65540, 137)
    values = [bits.view(torch.float32), halfway.view(torch.float32), tiny, edge, -edge]
    shift = torch.cat(values)
    ties = (torch.randint(1024, 2048, (5000,)) + 0.5) * torch.exp2(torch.randint(-20, 5, (5000,)))
    shift = torch.cat([shift, ties.float()])
    k = shift.numel()
    x = torch.zeros(1, 1, 1, 1, dtype=dtype)
    for kernel, stride in ((1, 1), (3, 1), (3, 2)):
        case = square(1, 1, 1, k, kernel, stride=(stride, stride), padding=(kernel // 2,) * 2)
        for plan in case.plans(dtype):
            with select.forced(plan):
                keywords = case.keywords | {"act": "none"}
                weight = torch.ones(case.weight_shape, dtype=dtype)
                got = rf.ops.conv_bn_act(x, weight, torch.ones(k), shift, **keywords)
            want = flushed(shift) if plan.endswith("_bf16") else shift
            assert_same(got.flatten(), want.to(dtype), f"({plan})")


def flushed(values):
    """Subnormal numbers of the dtype replaced by zero."""
    subnormal = values.abs() < torch.finfo(values.dtype).smallest_normal
    return values.masked_fill(subnormal, 0)


@needs_extension
@pytest.mark.parametrize("dtype", KERNEL_DTYPES[1:])
def test_16_bit_numbers_are_read_exactly(dtype, isa):
    """Every 16-bit pattern, subnormals and NaN included, through x, weight and residual.

    Plans with products of bfloat16 (vdpbf16ps) take subnormal numbers as zero.
    """
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    one, many = torch.ones(1), torch.ones(2**16)
    multiplied = flushed(every)
    for c in (1, 2, 16):  # both ways of gathering, alone and in a pair
        case = Case(1, c, 1, 2**16, 1, (1, 1))
        x, weight = torch.zeros(case.x_shape, dtype=dtype), torch.zeros(1, c, 1, 1, dtype=dtype)
        x[0, -1, 0], weight[0, -1] = every, 1
        turned = weight.new_zeros(2**16, c, 1, 1)
        turned[:, -1, 0, 0] = every
        for plan in case.plans(dtype):
            if plan == "torch":
                continue
            want = multiplied if plan.endswith("_bf16") else every
            with select.forced(plan):
                got = rf.ops.conv_bn_act(x, weight, one, one * 0, act="none")
                assert_same(got.flatten(), want, f"(x, {plan})")
                got = rf.ops.conv_bn_act(weight, turned, many, many * 0, act="none")
                assert_same(got.flatten(), want, f"(weight, {plan})")
    x, weight = torch.zeros(1, 1, 1, 1, dtype=dtype), torch.ones(2**16, 1, 1, 1, dtype=dtype)
    for plan in Case(1, 1, 1, 1, 2**16, (1, 1)).plans(dtype):
        with select.forced(plan):
            residual = every.view(1, -1, 1, 1)
            got = rf.ops.conv_bn_act(x, weight, many, many * 0, residual, act="none")
        want = multiplied if plan.endswith("_bf16") else every
        assert_same(got.flatten(), want, f"(residual, {plan})")


@needs_extension
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_sums_are_kept_in_float32(dtype, isa):
    """4096 + 1 a hundred times: lost in 16 bits one by one, kept in float32."""
    for kernel, stride in ((1, 1), (3, 1), (3, 2)):
        pad = kernel // 2
        case = square(1, 101, 1, 1, kernel, stride=(stride, stride), padding=(pad, pad))
        x = torch.ones(case.x_shape, dtype=dtype)
        weight = torch.zeros(case.weight_shape, dtype=dtype)
        weight[..., pad, pad] = 1
        weight[0, 0, pad, pad] = 4096
        for plan in case.plans(dtype):
            if plan == "torch":
                continue
            with select.forced(plan):
                args = (x, weight, torch.ones(1), torch.full((1,), -4096.0))
                y = rf.ops.conv_bn_act(*args, **case.keywords)
            assert abs(y.item() - 100) <= (0.1 if plan in SLACK else 0), plan


@pytest.mark.parametrize(("plan", "dtype"), PLAN_DTYPES)
@pytest.mark.parametrize("shape", [(0, 6, 5, 7), (0, 1, 1, 1), (0, 16, 3, 3)])
def test_batch_of_none(shape, plan, dtype):
    case = Case(*shape, 5, (3, 3), stride=TWO, padding=ONE).fitted(plan)
    got = fused(integers(case).to(dtype), case, plan)
    assert got.shape == case.y_shape
    assert is_dense_channels_last(got)


@needs_extension
def test_nothing_is_touched_beyond_the_operands():
    """In a process of its own, which ends at the first wrong access; malloc poisons its memory."""
    here = Path(__file__).parent
    # A copy of the package with other kernels comes first (run_variant.py).
    paths = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(here.parent)])
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(here / "guard_pages.py")],
        env={**os.environ, "MALLOC_PERTURB_": "128", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "nothing touched" in result.stdout


def test_int_arguments_are_pairs(dtype):
    case = square(1, 6, 7, 4, 2, stride=TWO, padding=ONE, dilation=TWO, groups=2)
    o = integers(case).to(dtype)
    got = rf.ops.conv_bn_act(*o.args(), stride=2, padding=1, dilation=2, groups=2)
    assert_same(got, exact(o, case).to(dtype))
    got = rf.ops.conv_bn_act(*o.args(), stride=[2, 2], padding=[1, 1], dilation=[2, 2], groups=2)
    assert_same(got, exact(o, case).to(dtype))


def test_defaults():
    case = square(1, 4, 5, 3, residual=False)
    o = integers(case).to(torch.float32)
    want = exact(o, case).float()
    assert_same(rf.ops.conv_bn_act(o.x, o.weight, o.scale, o.shift), want)
    assert_same(_ops.conv_bn_act(o.x, o.weight, o.scale, o.shift), want)


@pytest.mark.parametrize(("plan", "dtype"), PLAN_DTYPES)
def test_operands_are_left_alone(plan, dtype):
    """Nothing is written to the inputs, and the output is new memory."""
    for layout in ("contiguous", "channels_last"):
        case = square(2, 16, 4, 16, 1).fitted(plan)
        o = integers(case).to(dtype).laid_out(layout, layout)
        before = [t.clone() for t in o.args()]
        got = fused(o, case, plan)
        for t, copy in zip(o.args(), before, strict=True):
            assert_same(t, copy)
            assert got.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def test_x_may_be_its_own_residual(dtype):
    case = square(2, 17, 5, 17, padding=ONE)
    for layout in ("contiguous", "channels_last"):
        o = integers(case).to(dtype).laid_out(layout)
        o.residual = o.x
        for plan in case.plans(dtype):
            assert_whole(fused(o, case, plan), exact(o, case), plan, case)


@pytest.mark.parametrize("make", ["neg", "zero", "conj"])
def test_lazy_values_are_resolved(make):
    """Tensors whose sign or zeros are only a bit in the tensor, not in its memory."""
    case = square(1, 4, 5, 4, padding=ONE)
    o = integers(case).to(torch.float32)
    if make == "neg":
        o.x, o.residual = torch._neg_view(o.x), torch._neg_view(o.residual)
        assert o.x.is_neg()
    elif make == "zero":
        o.x = torch._efficientzerotensor(o.x.shape)
    else:
        o.x = torch.complex(o.residual, o.x).conj().imag
        assert o.x.is_neg()
    assert_same(fused(o, case), exact(o, case).float())


@needs_extension
@pytest.mark.skipif("RESNET_FUSED_SANITIZED" in os.environ, reason="sanitizers keep what was freed")
def test_a_call_leaves_no_memory_behind():
    """torch's own conversion of string arguments loses 100 bytes at every call."""
    x, weight, vector = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1)
    packed = rf.ops.pack_conv(weight, plan="direct")

    def call(times: int) -> None:
        for _ in range(times):
            _ops.conv_bn_act_packed(x, packed, vector, vector, kernel_size=ONE, plan="direct")

    with torch.inference_mode():
        call(1000)
        before = resident_bytes()
        call(30_000)
    assert resident_bytes() - before < 1_000_000
