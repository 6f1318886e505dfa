"""The stem: plan "stem" and the max-pool behind any plan, on every instruction set, by float64."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DTYPES,
    KERNEL_DTYPES,
    LAYOUTS,
    NAN,
    Case,
    assert_close_as_eager,
    assert_nearly_whole,
    assert_same,
    dirty_arena,
    eager,
    exact,
    integers,
    is_dense_channels_last,
    needs_extension,
    normals,
    poison,
    sprinkled,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fused as rf
from resnet_fused import _extension, check, reference, select

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]
_ops = torch.ops.resnet_fused
INF = float("inf")
THREE = (3, 3)


def stem(n, c, h, w, k, width=7, stride=2, padding=THREE, **rest):
    return Case(n, c, h, w, k, (7, width), (2, stride), padding, **rest)


# The nets' own stems, cut short; maps of every size around strips of 4 rows and tiles of 14, 12, 6
# columns; channels around vectors and panels; widths, strides and paddings of all kinds.
STEMS = [
    stem(1, 3, 61, 59, 64, residual=False),
    stem(2, 1, 28, 28, 64),
    *(stem(1, 3, h, 11, 5) for h in (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 18, 19, 33)),
    *(stem(1, 2, 9, w, 7) for w in (1, 2, 3, 4, 11, 13, 25, 26, 27, 28, 29, 30, 57, 58, 85)),
    *(stem(2, c, 10, 9, k) for c, k in ((1, 1), (2, 15), (3, 16), (4, 17), (5, 31), (3, 33))),
    *(stem(1, c, 8, 10, k) for c, k in ((9, 8), (16, 12), (17, 4), (3, 65), (1, 100))),
    *(stem(1, 3, 12, 13, 9, width) for width in (1, 2, 3, 5, 8, 11)),
    *(stem(1, 3, 12, 33, 9, 7, stride) for stride in (1, 3, 4, 9, 40)),
    *(stem(1, 3, 9, 8, 6, padding=p) for p in ((0, 0), (0, 3), (3, 0), (5, 9), (12, 1))),
    stem(None, 3, 14, 10, 20),
    stem(5, 3, 7, 7, 6, residual=False, act="none"),
]


def run(o, case, plan="stem", pool=False, packed=None):
    """conv_bn_act_packed into poisoned memory."""
    if packed is None:
        packed = rf.ops.pack_conv(o.weight, plan=plan)
    *batch, k, h, w = case.y_shape
    pixels = check.pooled_size(h) * check.pooled_size(w) if pool else h * w
    poison(torch.Size(batch).numel() * k * pixels * o.x.element_size())
    keywords = {**case.keywords, "kernel_size": case.kernel, "plan": plan, "pool": pool}
    return _ops.conv_bn_act_packed(o.x, packed, *o.args()[2:], **keywords)


def variants(case):
    for residual, act in ((True, "relu"), (False, "none"), (True, "none"), (False, "relu")):
        yield case.but(residual=residual, act=act)


@needs_extension
@pytest.mark.parametrize("case", STEMS, ids=str)
def test_whole_numbers(case, isa):
    """One wrong tap, row or channel is off by 2; a third of the weights are no binary fractions."""
    dirty_arena()
    for variant in variants(case):
        operands = integers(variant)
        want = exact(operands, variant)
        for dtype in KERNEL_DTYPES:
            hint = f"({dtype}, residual={variant.residual}, {variant.act})"
            o = operands.to(dtype)
            got = run(o, variant)
            assert_nearly_whole(got, want, 0.05, hint)
            assert is_dense_channels_last(got), hint
            pooled = run(o, variant, pool=True)
            assert_same(pooled, F.max_pool2d(got, 3, 2, 1), hint)
            assert is_dense_channels_last(pooled), hint


@needs_extension
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    "case",
    [*STEMS[:2], STEMS[15], STEMS[36], stem(1, 64, 12, 14, 9), stem(1, 300, 9, 9, 4)],
    ids=str,
)
def test_error(case, isa, dtype):
    """At most 2e-6 in float32; within twice eager's beyond that, in every dtype."""
    for act in ("relu", "none"):
        variant = case.but(act=act, residual=False)
        o = normals(variant).to(dtype)
        got, oracle = run(o, variant), exact(o, variant)
        assert_close_as_eager(got, eager(o, variant), oracle, allowed=2e-6)
        if dtype == torch.float32:
            assert (got.double() - oracle).norm() <= 2e-6 * oracle.norm()


@pytest.mark.threads
@needs_extension
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_every_way_to_cut_the_work(dtype, isa, threads):
    """Strips, panels and images over any number of threads: the same bits, pooled or not."""
    for case in (
        stem(1, 3, 111, 30, 40, residual=False),
        stem(3, 3, 37, 20, 70),
        stem(1, 2, 9, 16, 130),
        stem(7, 1, 8, 9, 8),
    ):
        o = normals(case).to(dtype)
        threads(1)
        want = [run(o, case, pool=pool) for pool in (False, True)]
        for count in (2, 3, 5, 8):
            threads(count)
            for _ in range(3):  # the rows between jobs are pooled by whichever ends last
                for pool in (False, True):
                    assert_same(run(o, case, pool=pool), want[pool], f"({case}, {count} threads)")


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [STEMS[0], STEMS[20]], ids=str)
def test_layouts(case, layout):
    """x in every memory layout, next to NaN that must not leak in."""
    moved = integers(case).to(torch.float32).laid_out(layout)
    for pool in (False, True):
        got = run(moved, case, pool=pool)
        assert_nearly_whole(got, reference_of(moved, case, pool), 0.05)


def reference_of(o, case, pool):
    want = exact(o, case)
    return F.max_pool2d(want, 3, 2, 1) if pool else want


@needs_extension
def test_batch_of_none(dtype):
    plan = "torch" if dtype == torch.float64 else "stem"
    case = stem(0, 3, 20, 22, 9)
    for pool in (False, True):
        got = run(integers(case).to(dtype), case, plan, pool)
        assert got.shape == ((0, 9, 5, 6) if pool else case.y_shape)
        assert got.dtype == dtype
        assert is_dense_channels_last(got)


# ---- packed weights ------------------------------------------------------------------------------

POINTS = [Fraction(p) for p in ("0", "1", "-1", "1/2", "-1/2")]


def toom_cook(points, taps):
    """G of F(m, taps) over these points and infinity: powers over products of distances."""
    rows = []
    for p in points:
        distance = Fraction(1)
        for q in points:
            distance *= p - q if q != p else 1
        rows.append([p**j / distance for j in range(taps)])
    return [*rows, [Fraction(0)] * (taps - 1) + [Fraction(1)]]


@needs_extension
def test_packed_layout():
    """packed[panel][row][kernel column, channel][32]: even and odd by turns, last the point 2."""
    case = stem(1, 3, 9, 9, 33, 5)
    weight = integers(case).weight
    even = toom_cook([*POINTS, Fraction(2)], 4)
    odd = toom_cook(POINTS, 3)
    even.insert(5, even.pop())  # infinity is the last of the shared points
    rows = []
    for row in range(13):
        taps = [0.0] * 7
        taps[row % 2 :: 2] = map(float, (odd if row % 2 else even)[row // 2])
        rows.append(taps)
    want = torch.zeros(64, 13, 5, 3, dtype=torch.float64)
    want[:33] = torch.einsum("ty,kcyx->ktxc", torch.tensor(rows, dtype=torch.float64), weight)
    got = rf.ops.pack_conv(weight.float(), plan="stem")
    assert got.shape == (2, 13, 15, 32)
    want = want.view(2, 32, 13, 15).permute(0, 2, 3, 1)
    torch.testing.assert_close(got.double(), want, rtol=1e-7, atol=1e-12)


@needs_extension
def test_packed_weights_serve_every_instruction_set(isa):
    case = STEMS[0]
    o = integers(case).to(torch.float32)
    packed = rf.ops.pack_conv(o.weight, plan="stem")
    assert_nearly_whole(run(o, case, packed=packed), exact(o, case), 0.05)


# ---- NaN and infinity ----------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_wild_pixel_stays_in_its_strip(value, isa):
    """It spoils what eager spoils, and nothing beyond 4 rows of the columns that see it."""
    case = stem(1, 3, 40, 40, 20, residual=False)
    for row, col in ((0, 0), (17, 22), (39, 39), (8, 31)):
        o = normals(case).to(torch.float32)
        o.x[0, 1, row, col] = value
        got = ~run(o, case).isfinite().all(dim=1)[0]
        want = ~exact(o, case).isfinite().all(dim=1)[0]
        assert not (want & ~got).any()
        rows, cols = want.any(dim=1), want.any(dim=0)
        strips = rows.view(-1, 4).any(dim=1).repeat_interleave(4)
        assert not (got & ~(strips[:, None] & cols[None])).any(), (row, col)


# ---- the max-pool --------------------------------------------------------------------------------

POOLED = [
    *(Case(2, 3, h, w, 5, (1, 1)) for h, w in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 4), (7, 5))),
    *(Case(1, 2, 6, 7, k, (1, 1)) for k in (1, 4, 8, 15, 16, 17, 33, 64, 100)),
    Case(None, 4, 9, 11, 20, (3, 3), padding=(1, 1)),
    Case(2, 8, 12, 9, 24, (3, 3), padding=(1, 1)),
    STEMS[0],
    STEMS[4],
]


@pytest.mark.threads
@needs_extension
@pytest.mark.parametrize("case", POOLED, ids=str)
def test_max_pool_behind_every_plan(case, isa, threads):
    """Exactly torch's max_pool2d of what the plan gives without it."""
    for count in (1, 2):
        threads(count)
        for dtype in DTYPES:
            for variant in (case, case.but(act="none", residual=False)):
                o = normals(variant).to(dtype)
                for plan in case.plans(dtype):
                    want = F.max_pool2d(run(o, variant, plan), 3, 2, 1)
                    got = run(o, variant, plan, pool=True)
                    assert_same(got, want, f"({plan}, {dtype}, {count} threads)")
                    assert is_dense_channels_last(got)


@needs_extension
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("act", ["relu", "none"])
def test_max_pool_passes_nan(value, act, isa):
    """Wherever in its window a NaN lies, alone or beside infinities."""
    for case in (stem(1, 3, 33, 29, 40, act=act), Case(1, 2, 9, 8, 21, (1, 1), act=act)):
        for dtype in DTYPES:
            o = normals(case).to(dtype)
            o.residual = sprinkled(sprinkled(o.residual, value, 40), NAN, 9, 1)
            for plan in case.plans(dtype):
                plain = run(o, case, plan)
                assert plain.isnan().any()
                assert_same(run(o, case, plan, pool=True), F.max_pool2d(plain, 3, 2, 1), plan)


def test_max_pool_of_the_fallback(dtype, monkeypatch):
    """Without compiled kernels the same: the definition in PyTorch's own ops."""
    case = Case(2, 3, 9, 8, 5, (3, 3), padding=(1, 1))
    o = integers(case).to(dtype)
    want = F.max_pool2d(exact(o, case), 3, 2, 1).to(dtype)
    assert_same(run(o, case, "torch", pool=True), want)
    assert_same(reference.max_pool(exact(o, case)).to(dtype), want)


# ---- as PyTorch sees it --------------------------------------------------------------------------


def keywords_of(case, plan):
    return {**case.keywords, "kernel_size": case.kernel, "plan": plan, "pool": True}


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("plan", ["stem", "direct", "torch"])
def test_opcheck_with_the_pool(plan, layout):
    case = stem(2, 3, 15, 13, 7)
    o = normals(case).to(torch.float32).laid_out(layout, layout)
    packed = rf.ops.pack_conv(o.weight, plan=plan)
    torch.library.opcheck(
        _ops.conv_bn_act_packed.default, (o.x, packed, *o.args()[2:]), keywords_of(case, plan)
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (5, 8), (8, 5)])
def test_fake_and_real_shapes_agree(shape):
    for n in (None, 0, 1, 3):
        case = Case(n, 2, *shape, 3, (1, 1))
        o = integers(case).to(torch.float32)
        args = (o.x, rf.ops.pack_conv(o.weight, plan="torch"), *o.args()[2:])
        real = _ops.conv_bn_act_packed(*args, **keywords_of(case, "torch"))
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(t) for t in args]
            fake = _ops.conv_bn_act_packed(*fakes, **keywords_of(case, "torch"))
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


def test_pool_is_forward_only():
    case = Case(1, 2, 5, 5, 3, (1, 1), residual=False)
    o = integers(case).to(torch.float32)
    o.x.requires_grad_()
    with pytest.raises(RuntimeError, match="conv_bn_act_packed: is forward only"):
        run(o, case, "torch", pool=True)


SENTENCES = [
    ({"kernel": (5, 7)}, "takes kernels of 7 rows in one group, got 5 x 7 in 1"),
    ({"groups": 3, "k": 6}, "takes kernels of 7 rows in one group, got 7 x 7 in 3"),
    (
        {"stride": (1, 2)},
        "takes stride 2 along the rows and dilation 1, got stride (1, 2) and dilation (1, 1)",
    ),
    (
        {"dilation": (1, 2)},
        "takes stride 2 along the rows and dilation 1, got stride (2, 2) and dilation (1, 2)",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), SENTENCES)
def test_what_the_plan_refuses(change, sentence):
    case = stem(1, 3, 30, 30, 6, residual=False).but(**change)
    o = normals(case).to(torch.float32)
    packed = torch.zeros(1, 13, 7 * 3 // case.groups, 32)
    for mode in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode, pytest.raises((RuntimeError, ValueError)) as caught:
            _ops.conv_bn_act_packed(*(o.x, packed, o.scale, o.shift), **keywords_of(case, "stem"))
        assert str(caught.value) == f'conv_bn_act_packed: plan "stem" {sentence}'
    if "kernel" in change or "groups" in change:
        with pytest.raises(ValueError, match="pack_conv: plan") as caught:
            rf.ops.pack_conv(o.weight, case.groups, plan="stem")
        assert str(caught.value) == f'pack_conv: plan "stem" {sentence}'


# ---- the choice ----------------------------------------------------------------------------------

SHAPE = select.ConvShape("cpu", torch.float32, 3, 64, (7, 7), (112, 112), (2, 2))


@needs_extension
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "stem"),
        ({"in_channels": 64}, "stem"),
        ({"kernel": (7, 3), "stride": (2, 5)}, "stem"),
        ({"out_size": (3, 1)}, "stem"),
        ({"out_size": (2, 50)}, "direct"),
        ({"kernel": (5, 5)}, "direct"),
        ({"stride": (1, 1)}, "direct"),
        ({"dilation": (2, 1)}, "direct"),
        ({"groups": 3, "out_channels": 96}, "direct"),
        ({"dtype": torch.float64}, "torch"),
    ],
)
def test_rule(changes, expected):
    choice = select.by_rule(replace(SHAPE, **changes))
    assert choice.plan == expected
    assert choice.reason


@needs_extension
def test_rule_of_16_bit_channels(monkeypatch):
    monkeypatch.setattr(_extension, "CPU_FEATURES", frozenset())
    few = replace(SHAPE, dtype=torch.bfloat16)
    assert select.by_rule(few).plan == "stem"
    many = select.by_rule(replace(few, in_channels=16)).plan
    assert many == ("direct_bf16" if rf.ops.cpu_isa() == "avx512bf16" else "stem")
    monkeypatch.setattr(_extension, "CPU_FEATURES", frozenset({"amx_bf16"}))
    assert select.by_rule(few).plan == "torch"


@needs_extension
def test_exact_nonfinite_keeps_to_direct_kernels():
    assert select.choose(SHAPE, exact_nonfinite=True).plan == "direct"
    assert "stem" in select.candidates(SHAPE)
    assert "stem" not in select.candidates(SHAPE, exact_nonfinite=True)
    with select.forced("stem"):
        assert select.choose(SHAPE).plan == "stem"
        assert select.choose(replace(SHAPE, kernel=(3, 3))).plan == "direct"
