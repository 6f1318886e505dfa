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
from conftest import KERNEL_DTYPES, NAN, Case, needs_extension, normals, randomize
from torch import nn

import resnet_fused as rf
from resnet_fused import select

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]

INF = float("inf")
ONE = (1, 1)
CASES = [
    Case(2, 20, 9, 10, 33, (3, 3), padding=ONE),
    Case(1, 64, 7, 7, 32, (3, 3), padding=ONE),
    Case(1, 3, 12, 11, 40, (7, 7), stride=(2, 2), padding=(3, 3)),
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


def sprinkle(t, value, count, seed=0):
    """t with `count` of its elements set to value."""
    t = t.clone()
    g = torch.Generator().manual_seed(seed)
    t.view(-1)[torch.randperm(t.numel(), generator=g)[:count]] = value
    return t


@needs_extension
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "weight", "scale", "shift", "residual"])
@pytest.mark.parametrize("word", ["direct", "torch", "winograd4", "winograd2"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_wild_becomes_tame(case, word, where, value, isa):
    for dtype in KERNEL_DTYPES if word != "torch" else (torch.float32, torch.float64):
        o = normals(case).to(dtype)
        setattr(o, where, sprinkle(getattr(o, where), value, 2))
        for act in ("relu", "none"):
            want = wild_in_eager(o, case, act)
            got = fused(o, case, word, act)
            tame = want & got.isfinite()
            assert not tame.any(), f"{int(tame.sum())} elements, {act}, {dtype}"


@needs_extension
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["x", "scale", "shift", "residual"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_direct_kernels_keep_them_in_place(case, where, value, isa):
    """Not one output more than in eager becomes NaN or infinite."""
    for dtype in KERNEL_DTYPES:
        o = normals(case).to(dtype)
        setattr(o, where, sprinkle(getattr(o, where), value, 2))
        for act in ("relu", "none"):
            want, got = eager(o, case, act), fused(o, case, "direct", act)
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got == INF, want == INF)
            assert torch.equal(got == -INF, want == -INF)


@needs_extension
@pytest.mark.parametrize("word", ["winograd4", "winograd2"])
def test_winograd_keeps_them_in_their_tile(word, isa):
    """A tile is 4 x 4 or 2 x 2 outputs; its window reaches one pixel further."""
    m = int(word[-1])
    case = Case(1, 16, 12, 12, 16, (3, 3), padding=ONE, residual=False)
    for row, col in ((0, 0), (5, 6), (11, 3), (4, 4), (7, 8)):
        o = normals(case).to(torch.float32)
        o.x[0, 3, row, col] = NAN
        spoiled = fused(o, case, word).isnan().any(dim=1)[0]
        assert spoiled[max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2].all()
        first = [(max(p - 1, 0)) // m * m for p in (row, col)]
        last = [(min(p + 1, 11)) // m * m + m for p in (row, col)]
        spoiled[first[0] : last[0], first[1] : last[1]] = False
        assert not spoiled.any(), (row, col)


@pytest.mark.parametrize("word", ["direct", "torch", "winograd4", "winograd2"])
def test_overflow_is_infinite(word, isa):
    """Sums beyond float32 become what eager makes of them, never something finite."""
    case = Case(1, 20, 6, 6, 16, (3, 3), padding=ONE, residual=False)
    o = normals(case).to(torch.float32)
    o.x = o.x.abs() * 1e38
    o.weight = o.weight.abs() * 30
    o.scale, o.shift = o.scale.abs(), o.shift
    want = eager(o, case)
    assert wild(want).any()
    assert not (wild(want) & fused(o, case, word).isfinite()).any()


@pytest.mark.parametrize("word", ["direct", "torch"])
def test_large_values_stay_finite_in_direct_kernels(word, isa):
    case = Case(1, 20, 6, 6, 16, (3, 3), padding=ONE, residual=False)
    o = normals(case).to(torch.float32)
    o.x = o.x * 1e34
    want = eager(o, case)
    assert want.isfinite().all()
    torch.testing.assert_close(fused(o, case, word), want, rtol=1e-4, atol=1e29)


@pytest.mark.parametrize("word", ["direct", "torch", "winograd4", "winograd2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relu_passes_nan_at_every_lane(word, dtype, isa):
    case = Case(1, 4, 5, 5, 50, (3, 3), padding=ONE)
    for channel in range(case.k):
        o = normals(case).to(dtype)
        o.shift[channel] = NAN
        got = fused(o, case, word)
        assert got[:, channel].isnan().all()
        rest = torch.cat([got[:, :channel], got[:, channel + 1 :]], dim=1)
        assert rest.isfinite().all()


def test_negative_infinity_becomes_zero(isa):
    case = Case(1, 4, 5, 5, 50, (3, 3), padding=ONE)
    o = normals(case).to(torch.float32)
    o.shift[7] = -INF
    for word in ("direct", "torch", "winograd4", "winograd2"):
        assert (fused(o, case, word)[:, 7] == 0).all()
        assert (fused(o, case, word, "none")[:, 7] == -INF).all()


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
    x = sprinkle(image(), value, 3)
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
        for word in ("direct", "torch", "winograd4", "winograd2"):
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
    x = sprinkle(torch.randn(1, 3, 33, 31), NAN, 4)
    with torch.no_grad():
        want = F.relu(bn(conv(x)))
        assert torch.equal(module(x).isnan(), want.isnan())
