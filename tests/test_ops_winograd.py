"""What only Winograd kernels can get wrong: tiles over every edge, windows in the padding, errors.

Whole numbers again, by every plan that can compute a convolution of 3x3.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from conftest import (
    KERNEL_DTYPES,
    Case,
    assert_close_as_eager,
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
)
from winograd_algorithms import algorithm

from resnet_fused.check import CPU_PLANS, PLAN_TRAITS

pytestmark = [needs_extension, pytest.mark.usefixtures("one_thread")]
ONE, TWO = (1, 1), (2, 2)
STRIDES = pytest.mark.parametrize("stride", [ONE, TWO], ids=["s1", "s2"])


def winograd_plans(case, dtype):
    return [plan for plan in case.plans(dtype) if algorithm(plan)]


def check(case, dtype, plans=None, hint=""):
    """Whole numbers by these plans, all Winograd ones by default."""
    o = integers(case)
    want = exact(o, case)
    o = o.to(dtype)
    for plan in plans or winograd_plans(case, dtype):
        got = fused(o, case, plan)
        assert_whole(got, want, plan, case, f"({dtype}) {hint}")
        assert is_dense_channels_last(got)


# Maps of every size around two tiles of every algorithm; channels around vectors, pairs and panels;
# images one by one and several, so that tiles of one block lie in two of them.
MAPS = [
    *((1, 1, 1), (1, 1, 4), (1, 2, 3), (1, 3, 2), (1, 4, 4), (1, 5, 5), (2, 6, 7), (1, 7, 7)),
    *((1, 8, 8), (3, 9, 5), (1, 10, 11), (1, 12, 13), (2, 16, 17), (1, 19, 21), (None, 6, 9)),
]
CHANNELS = [
    *((1, 1), (3, 31), (4, 4), (7, 8), (8, 12), (9, 16), (16, 17), (15, 32), (17, 3), (33, 1)),
    *((31, 5), (32, 40), (63, 33), (65, 64), (96, 100)),
]
# The last ones are wider than any window: whole windows see nothing but padding.
PADDINGS = [(0, 0), (0, 1), (2, 0), (3, 4), (5, 2), (4, 9), (10, 3), (11, 12)]
CASES = [
    *(Case(n, 17, h, w, 33, (3, 3), padding=ONE) for n, h, w in MAPS),
    *(Case(2, c, 6, 7, k, (3, 3), padding=ONE) for c, k in CHANNELS),
    *(Case(1, 5, 6, 7, 8, (3, 3), padding=p) for p in PADDINGS),
    *(Case(2, 3, 1, 2, 5, (3, 3), padding=p) for p in ((11, 12), (1, 20))),
    Case(1, 520, 3, 3, 9, (3, 3), padding=ONE),
]


@STRIDES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers(case, stride, isa, threads):
    """In dirty memory, with and without residual and activation, by one thread and by two."""
    dirty_arena()
    for count, residual, act in ((1, True, "relu"), (1, False, "none"), (2, True, "none")):
        threads(count)
        variant = case.but(stride=stride, residual=residual, act=act)
        for dtype in KERNEL_DTYPES:
            check(variant, dtype, hint=f"({count} threads, residual={residual}, act={act})")


@STRIDES
def test_every_map_and_padding(stride, isa):
    """Maps of 1x1 to 9x9 in paddings of 0 to 3 on each side, no two sizes tied to each other."""
    dirty_arena()
    for h, w in product(range(1, 10), repeat=2):
        for padding in product(range(4), repeat=2):
            case = Case(1, 2, h, w, 3, (3, 3), stride, padding, residual=(h + w) % 2 == 0)
            if h + 2 * padding[0] >= 3 and w + 2 * padding[1] >= 3:
                check(case, torch.float32)
                check(case, torch.bfloat16, [p for p in case.plans(torch.bfloat16) if "bf16" in p])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_every_number_of_channels(dtype, isa):
    """Part of a vector, of a pair, of a chunk and of a panel, in both transforms."""
    dirty_arena()
    for stride in (ONE, TWO):
        for c in range(1, 50):
            check(Case(1, c, 3, 4, 2, (3, 3), stride, padding=ONE), dtype)
        for k in range(1, 67):
            for residual in (True, False):
                case = Case(1, 2, 3, 4, k, (3, 3), stride, padding=ONE, residual=residual)
                check(case, dtype)


@pytest.mark.parametrize("plan", [name for name in CPU_PLANS if algorithm(name)])
def test_every_number_of_tiles(plan, isa):
    """Each number of rows that a register tile can have, and more tiles than a job takes."""
    dtype = PLAN_TRAITS[plan].dtypes[0]
    table = algorithm(plan)
    for tiles in [*range(1, 32), 57, 90]:
        width = tiles * table.out * table.stride
        case = Case(1, 5, 1, width, 37, (3, 3), padding=ONE).fitted(plan)
        if plan in case.plans(dtype):
            check(case, dtype, [plan])


@STRIDES
def test_every_inner_tile(stride, isa):
    """Windows that touch no edge, on maps so large that most are inside; unaligned channels."""
    for c in (16, 20, 32, 48):
        for padding in (ONE, (0, 0)):
            case = Case(2, c, 27, 30, 20, (3, 3), stride, padding)
            for dtype in KERNEL_DTYPES:
                check(case, dtype)


# ---- errors --------------------------------------------------------------------------------------


@STRIDES
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 64, 14, 14, 64, (3, 3), padding=ONE),
        Case(1, 512, 2, 2, 100, (3, 3), padding=ONE),
        Case(2, 17, 9, 5, 31, (3, 3), padding=ONE),
        Case(1, 520, 3, 3, 9, (3, 3), padding=ONE),
    ],
    ids=str,
)
def test_error_without_residual(case, dtype, stride, isa):
    for act in ("relu", "none"):
        variant = case.but(stride=stride, act=act, residual=False)
        o = normals(variant).to(dtype)
        theirs, oracle = eager(o, variant), exact(o, variant)
        for plan in winograd_plans(variant, dtype):
            assert_close_as_eager(fused(o, variant, plan), theirs, oracle, float32_bound(plan))


@cache
def operands(channels, stride, rectified, seed):
    """A map of whole and of partial tiles, no shift and no residual that would hide errors."""
    case = Case(1, channels, 21, 22, 64, (3, 3), stride, ONE, residual=False, act="none")
    o = normals(case, seed).to(torch.float32)
    o.shift.zero_()
    if rectified:
        o.x = o.x.clamp_min(0)
    return case, o, exact(o, case)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("rectified", [False, True], ids=["normal", "relu"])
@pytest.mark.parametrize("channels", [64, 256, 512])
@pytest.mark.parametrize("plan", [p for p in CPU_PLANS if torch.float32 in PLAN_TRAITS[p].dtypes])
def test_error_of_one_convolution(plan, channels, rectified, isa):
    """What the project promises of every convolution in float32, whoever computes it."""
    for seed in range(3):
        for stride in (ONE, TWO):
            case, o, want = operands(channels, stride, rectified, seed)
            if plan in case.plans(torch.float32):
                assert relative(fused(o, case, plan), want) <= float32_bound(plan)


@pytest.mark.parametrize("plan", [p for p in CPU_PLANS if torch.float32 in PLAN_TRAITS[p].dtypes])
def test_error_does_not_grow_with_the_channels(plan, isa):
    """Sums are kept in blocks: 16 times the channels in one go would have 4 times the error."""
    if plan == "torch":
        pytest.skip("PyTorch's own sums")
    stride = (PLAN_TRAITS[plan].stride,) * 2
    few, many = (
        relative(fused(o, case, plan), want)
        for case, o, want in (operands(channels, stride, False, 0) for channels in (64, 1024))
    )
    assert many <= 1.6 * few
