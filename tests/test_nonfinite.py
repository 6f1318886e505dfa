"""NaN and infinities: every output that eager makes NaN or +Inf is not finite in ours.

Direct kernels keep them where they belong; a Winograd kernel may spread them over its output tile,
and exact_nonfinite turns Winograd off.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DTYPES,
    KERNEL_DTYPES,
    NAN,
    Case,
    needs_extension,
    normals,
    randomize,
    sprinkled,
)
from torch import nn
from winograd_algorithms import algorithm

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.check import CPU_PLANS, PLAN_TRAITS

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

INF = float("inf")
ONE = (1, 1)
CASES = [
    Case(2, 20, 9, 10, 33, (3, 3), padding=ONE),
    Case(1, 64, 7, 7, 32, (3, 3), padding=ONE),
    Case(1, 3, 12, 11, 40, (7, 7), stride=(2, 2), padding=(3, 3)),
    Case(2, 19, 11, 9, 33, (3, 3), stride=(2, 2), padding=ONE),
    Case(1, 16, 6, 5, 17, (1, 1), stride=(2, 2)),
    Case(1, 8, 6, 5, 12, (3, 3), padding=(2, 2), dilation=(2, 2), groups=2),
    Case(1, 16, 1, 1, 20, (3, 3), padding=ONE),
    Case(2, 16, 2, 3, 20, (5, 5), padding=(4, 4)),
]


def convolve(x, weight, case):
    return F.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups)


def eager(o, case, act="relu"):
    """conv, scale, shift, residual and relu in float32 at least."""
    wide = o.scale.dtype
    y = convolve(o.x.to(wide), o.weight.to(wide), case)
    y = y * o.scale[:, None, None] + o.shift[:, None, None]
    y = y if o.residual is None else y + o.residual.to(wide)
    return F.relu(y) if act == "relu" else y


def wild(y):
    """Where an output is NaN or +Inf."""
    return y.isnan() | (y == INF)


def wild_in_eager(o, case, act):
    """Wild outputs, but for those whose wild weights meet nothing but the zeros of the padding.

    Whether 0 * NaN counts there depends on the algorithm that PyTorch chooses, by layout for one.
    """
    meets = convolve(torch.ones_like(o.x.float()), (~o.weight.isfinite()).float(), case) > 0
    return wild(eager(o, case, act)) & (meets if not o.weight.isfinite().all() else True)


def fused(o, case, word, act="relu"):
    with select.forced(word):
        return rf.ops.conv_bn_act(*o.args(), **case.keywords | {"act": act})


@needs_extension
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "weight", "scale", "shift", "residual"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_wild_becomes_tame(case, where, value, isa):
    for dtype in DTYPES:
        o = normals(case).to(dtype)
        setattr(o, where, sprinkled(getattr(o, where), value, 2))
        for act in ("relu", "none"):
            want = wild_in_eager(o, case, act)
            for plan in case.plans(dtype):
                if plan == "torch" and dtype in KERNEL_DTYPES[1:]:
                    continue  # PyTorch's convolution rounds before the epilogue
                tame = want & fused(o, case, plan, act).isfinite()
                assert not tame.any(), f"{int(tame.sum())} elements, {plan}, {act}, {dtype}"


@needs_extension
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "scale", "shift", "residual"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_direct_kernels_keep_them_in_place(case, where, value, isa):
    """Not one output more than in eager becomes NaN or infinite."""
    for dtype in KERNEL_DTYPES:
        o = normals(case).to(dtype)
        setattr(o, where, sprinkled(getattr(o, where), value, 2))
        for act in ("relu", "none"):
            want = eager(o, case, act)
            for plan in case.plans(dtype):
                if PLAN_TRAITS[plan].spreads or plan == "torch":
                    continue
                got = fused(o, case, plan, act)
                assert torch.equal(got.isnan(), want.isnan()), plan
                assert torch.equal(got == INF, want == INF), plan
                assert torch.equal(got == -INF, want == -INF), plan


@needs_extension
@pytest.mark.parametrize("plan", [plan for plan in CPU_PLANS if algorithm(plan)])
def test_winograd_keeps_them_in_their_tile(plan, isa):
    """Every output that meets the NaN has it, and none in a tile whose window does not."""
    m, stride, window = (getattr(algorithm(plan), name) for name in ("out", "stride", "window"))
    case = Case(1, 17, 25, 26, 16, (3, 3), padding=ONE, residual=False).fitted(plan)
    dtype = PLAN_TRAITS[plan].dtypes[0]
    if plan not in case.plans(dtype):
        pytest.skip("another instruction set")

    def reached(pixel, size):
        """Outputs that meet this row or column, and those in a tile whose window has it."""
        outputs = torch.arange(size)
        first = outputs // m * m * stride - 1
        meets = (outputs * stride - 1 <= pixel) & (pixel <= outputs * stride + 1)
        return meets, (first <= pixel) & (pixel < first + window)

    for row, col in ((0, 0), (5, 6), (24, 3), (4, 4), (7, 8), (10, 25), (16, 15)):
        o = normals(case).to(dtype)
        o.x[0, 3, row, col] = NAN
        spoiled = fused(o, case, plan).isnan().any(dim=1)[0]
        (rows, near_rows), (cols, near_cols) = (
            reached(pixel, size) for pixel, size in zip((row, col), case.y_shape[-2:], strict=True)
        )
        assert spoiled[rows][:, cols].all(), (row, col)
        spoiled &= ~(near_rows[:, None] & near_cols)
        assert not spoiled.any(), (row, col)


GEOMETRY = pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])


def narrow_case(kernel, stride, k=16):
    pad = kernel // 2
    return Case(
        *(1, 20, 6, 6, k, (kernel, kernel), (stride, stride), (pad, pad)),
        residual=False,
    )


@GEOMETRY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overflow_is_infinite(dtype, kernel, stride, isa):
    """Sums beyond float32 become what eager makes of them, never something finite."""
    case = narrow_case(kernel, stride)
    o = normals(case)
    o.x, o.weight, o.scale = o.x.abs() * 1e38, o.weight.abs() * 30, o.scale.abs()
    o = o.to(dtype)
    want = eager(o, case)
    assert wild(want).any()
    for plan in case.plans(dtype):
        assert not (wild(want) & fused(o, case, plan).isfinite()).any(), plan


@GEOMETRY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_values_stay_finite_in_direct_kernels(dtype, kernel, stride, isa):
    case = narrow_case(kernel, stride)
    o = normals(case)
    o.x = o.x * 1e34
    o = o.to(dtype)
    want = eager(o, case)
    assert want.isfinite().all()
    rtol = 1e-4 if dtype == torch.float32 else 0.01
    for plan in case.plans(dtype):
        if not PLAN_TRAITS[plan].spreads:
            got = fused(o, case, plan)
            torch.testing.assert_close(got, want.to(dtype), rtol=rtol, atol=rtol * 1e33)


@GEOMETRY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_relu_passes_nan_at_every_lane(dtype, kernel, stride, isa):
    case = narrow_case(kernel, stride, k=50)
    for channel in range(case.k):
        o = normals(case).to(dtype)
        o.shift[channel] = NAN
        for plan in case.plans(dtype):
            got = fused(o, case, plan)
            assert got[:, channel].isnan().all(), plan
            rest = torch.cat([got[:, :channel], got[:, channel + 1 :]], dim=1)
            assert rest.isfinite().all(), plan


@GEOMETRY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negative_infinity_becomes_zero(dtype, kernel, stride, isa):
    case = narrow_case(kernel, stride, k=50)
    o = normals(case).to(dtype)
    o.shift[7] = -INF
    for plan in case.plans(dtype):
        assert (fused(o, case, plan)[:, 7] == 0).all(), plan
        assert (fused(o, case, plan, "none")[:, 7] == -INF).all(), plan


# ---- modules -------------------------------------------------------------------------------------


def block():
    torch.manual_seed(0)
    return randomize(rf.FusedResidual(32, 32)).eval()


def image():
    return torch.randn(1, 32, 48, 48, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("force", ["ours", "none"])
def test_block_hides_nothing(force, value):
    fused_block = block()
    x = sprinkled(image(), value, 3)
    with torch.no_grad(), select.forced(force):
        want = wild(fused_block.original()(x))
        assert want.any()
        assert not (want & fused_block(x).isfinite()).any()


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("value", [NAN, INF, -1.0])
@pytest.mark.parametrize("norm", ["bn1", "bn2"])
def test_spoiled_norms_show(norm, name, value):
    """Diverged statistics, a negative variance: whatever eager shows, ours must not hide."""
    fused_block = block()
    with torch.no_grad():
        getattr(getattr(fused_block, norm), name)[5] = value
        for word in CPU_PLANS:
            with select.forced(word):
                want = wild(fused_block.original()(image()))
                assert not (want & fused_block(image()).isfinite()).any()


@needs_extension
def test_exact_nonfinite_keeps_to_direct_kernels():
    fused_block = block()
    x = image()
    with torch.no_grad():
        fused_block(x)
        assert "winograd" in fused_block.status().backend, "nothing to turn off"
        fused_block.exact_nonfinite = True
        x[0, 3, 20, 20] = NAN
        got = fused_block(x)
        assert "winograd" not in fused_block.status().backend
        assert "exact_nonfinite" in fused_block.status().reason
        want = fused_block.original()(x)
        assert torch.equal(got.isnan(), want.isnan())
        fused_block.exact_nonfinite = False
        fused_block(x)
        assert "winograd" in fused_block.status().backend


@needs_extension
def test_exact_nonfinite_by_environment():
    code = (
        "import torch, resnet_fused as rf\n"
        "block = rf.FusedResidual(32, 32).eval()\n"
        "with torch.no_grad(): block(torch.randn(1, 32, 48, 48))\n"
        "print(block.status().backend)"
    )
    backends = []
    for value in ("0", "1"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RESNET_FUSED_EXACT_NONFINITE": value},
            capture_output=True,
            text=True,
            check=True,
        )
        backends.append(result.stdout.strip())
    assert "winograd" in backends[0]
    assert "direct" in backends[1]
    assert "winograd" not in backends[1]


@needs_extension
def test_conv_bn_hides_nothing():
    conv, bn = nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.BatchNorm2d(64)
    module = randomize(rf.FusedConvBN(conv, bn)).eval()
    x = sprinkled(torch.randn(1, 3, 33, 31), NAN, 4)
    with torch.no_grad():
        want = F.relu(bn(conv(x))).isnan()
        got = module(x).isnan()
        module.exact_nonfinite = True
        assert torch.equal(module(x).isnan(), want)
    assert bool(got[want].all()), "a NaN was hidden"
    # The stem's kernel transforms along the rows, four of the output at a time.
    for top in range(0, want.shape[2], 4):
        tile = slice(top, top + 4)
        spread = want[:, :, tile].any(2, keepdim=True)
        assert bool((~got[:, :, tile] | spread).all()), "a NaN left its tile"
