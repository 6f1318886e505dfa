"""The Triton kernels in Triton's interpreter, against the float64 oracle, over the rows of the op.

Run by test_triton_interpreted.py in a process of its own, because the interpreter must be on before
the kernels are defined:

    TRITON_INTERPRET=1 RESNET_FUSED_DISABLE_EXT=1 python -m pytest tests/interpreted_triton.py
"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    LAYOUTS,
    Case,
    assert_close_as_eager,
    assert_same,
    eager,
    exact,
    integers,
    is_dense_channels_last,
    normals,
    poison,
    randomize,
)
from gpu_cases import (
    ONE,
    SCALES,
    SMALL,
    TWO,
    exact_with_shortcut,
    shortcut_of,
    small_net,
    with_shortcut,
)
from guard_pages import channels_last, guarded
from test_ops_conv import CASES, CHANNELS, GEOMETRIES, square
from torch import nn

import resnet_fused as rf
from resnet_fused import select
from resnet_fused._environment import INTERPRETED
from resnet_fused._fused import FusedModule
from resnet_fused.ops import _triton
from resnet_fused.triton_kernels import config as configs
from resnet_fused.triton_kernels.device import KNOWN
from resnet_fused.triton_kernels.problem import Problem

assert INTERPRETED, "TRITON_INTERPRET=1 must be set"

_ops = torch.ops.resnet_fused
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(o, case, config="", **shortcut):
    """The Triton op into poisoned memory."""
    poison(math.prod(case.y_shape) * o.x.element_size())
    names = ("stride", "padding", "dilation", "groups", "act")
    keywords = {name: getattr(case, name) for name in names} | shortcut
    return _ops.conv_bn_act_triton(*o.args(), kernel_size=case.kernel, config=config, **keywords)


def _products(case):
    return math.prod(case.y_shape) * math.prod(case.weight_shape[1:])


ROWS = [case for case in CASES if _products(case) < 2e6]  # the interpreter takes its time
assert len(ROWS) > 0.85 * len(CASES)


def text(tile, split=1):
    return str(replace(tile, split=split))


# Few steps of few programs, which is what the interpreter's time goes by.
LARGE = configs.Config(128, 64, 64, 4, 2)
CHOICES = ("", text(LARGE), text(LARGE, 2))  # the rule's, one program a tile, two


@pytest.mark.parametrize(("index", "case"), list(enumerate(ROWS)), ids=str)
def test_whole_numbers(index, case):
    """Every geometry, dtypes and epilogues in turn: one wrong tap, channel or rounding shows."""
    dtype = DTYPES[index % 3]
    variant = case.but(residual=index % 2 == 0, act=("relu", "none")[index // 2 % 2])
    o = integers(variant).to(dtype)
    got = run(o, variant, CHOICES[index // 4 % 3])
    assert_same(got, exact(o, variant).to(dtype), f"({variant}, {dtype})")
    assert is_dense_channels_last(got)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("tile", configs.TILES, ids=str)
def test_every_configuration(tile, split):
    """Each tile alone and shared; more parts than steps leave some without any."""
    for i, case in enumerate(SMALL):
        dtype = DTYPES[(i + tile.pixels + split) % 3]
        o = integers(case).to(dtype)
        got = run(o, case, text(tile, split))
        assert_same(got, exact(o, case).to(dtype), f"({case}, {dtype})")
    case, dtype = SMALL[split % 2].but(residual=False), DTYPES[split % 3]
    o, s, branch = with_shortcut(case, dtype)
    got = run(o, case, text(tile, split), **shortcut_of(s, branch))
    assert_same(got, exact_with_shortcut(o, case, s, branch).to(dtype), "(shortcut)")


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 16, 40, 70])
def test_shortcuts(channels, stride):
    case = square(2, 20, 4, 33, padding=ONE, residual=False)
    for dtype, act in zip(DTYPES, ("relu", "none", "relu"), strict=True):
        for config in ("", text(LARGE, 2)) if dtype == torch.bfloat16 else ("",):
            o, s, branch = with_shortcut(case, dtype, channels, stride)
            got = run(o, case.but(act=act), config, **shortcut_of(s, branch))
            want = exact_with_shortcut(o, case.but(act=act), s, branch)
            assert_same(got, want.to(dtype))
            assert is_dense_channels_last(got)


@pytest.mark.parametrize("split", [1, 3])
def test_scales_of_both_branches(split):
    """Zero, tiny and negative on either side: last batch norms often begin with gamma = 0. And a
    ratio that float32 holds, but not what it multiplies."""
    pairs = [*itertools.product(SCALES, SCALES), (3e30, 1e-8)]
    case = square(1, 16, 4, len(pairs), padding=ONE, residual=False, act="none")
    branch = case.but(c=24, h=8, w=8, kernel=(1, 1), padding=(0, 0), stride=TWO)
    o, s = normals(case).to(torch.float32), normals(branch).to(torch.float32)
    o.scale, s.scale = (torch.tensor(side) for side in zip(*pairs, strict=True))
    config = f"32x32x16 warps 4 stages 3 split {split}"
    got = run(o, case, config, **shortcut_of(s, branch))
    parts = [exact(o, case), exact(s, branch)]
    sizes = [part.abs().amax((0, 2, 3)) for part in parts]
    error = (got.double() - sum(parts)).abs().amax((0, 2, 3))
    assert (error <= 1e-6 * (sizes[0] + sizes[1])).all(), pairs[int(error.argmax())]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["x", "shortcut_x", "scale", "shortcut_scale", "residual"])
@pytest.mark.parametrize("split", [1, 2])
def test_nothing_wild_becomes_tame(value, place, split):
    """What eager makes NaN or +Inf is not finite, whatever the scales."""
    joined = place.startswith("shortcut")
    case = square(1, 16, 4, 32, padding=ONE, residual=not joined)
    branch = case.but(c=24, h=8, w=8, kernel=(1, 1), padding=(0, 0), stride=TWO, residual=False)
    o, s = normals(case).to(torch.float32), normals(branch).to(torch.float32)
    for scale in (o.scale, s.scale):
        scale[::3] = 0
    o.scale[1], s.scale[1] = 1e-6, -1e-6
    target = (s if joined else o).__dict__[place.removeprefix("shortcut_")]
    target.view(-1)[target.numel() // 2] = value
    shortcut = shortcut_of(s, branch) if joined else {}
    got = run(o, case, f"32x32x16 warps 4 stages 3 split {split}", **shortcut)
    conv = F.conv2d(o.x, o.weight, padding=1) * o.scale[:, None, None] + o.shift[:, None, None]
    if joined:
        second = F.conv2d(s.x, s.weight, stride=2)
        conv += second * s.scale[:, None, None] + s.shift[:, None, None]
    else:
        conv += o.residual
    wild = ~conv.relu().isfinite()
    assert wild.any() or value == -math.inf
    assert not got[wild].isfinite().any()


@pytest.mark.parametrize("case", [*SMALL, CHANNELS[4], GEOMETRIES[28]], ids=str)
def test_error_is_eagers(case):
    for dtype in DTYPES:
        o = normals(case).to(dtype)
        assert_close_as_eager(run(o, case, text(LARGE)), eager(o, case), exact(o, case))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    for case, dtype in ((CHANNELS[8], DTYPES[0]), (GEOMETRIES[9], DTYPES[1])):
        moved = integers(case).to(dtype).laid_out(layout, layout)
        got = run(moved, case, text(LARGE))
        assert_same(got, exact(moved, case).to(dtype))
        assert is_dense_channels_last(got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_vectors_of_any_strides(dtype):
    case = GEOMETRIES[9]
    o = integers(case).to(dtype)
    want = exact(o, case).to(dtype)
    for layout in ("contiguous", "sliced", "shifted", "every_other_channel"):
        o.weight = LAYOUTS[layout](o.weight)
        o.scale, o.shift = torch.stack([o.scale, o.shift], dim=1).unbind(1)
        assert_same(run(o, case, text(LARGE)), want)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_offsets_of_64_bits(case, monkeypatch):
    """What tensors beyond 2^31 elements take, with small ones."""
    case = case.but(act="none")  # not in the caches of plans
    monkeypatch.setattr(Problem, "largest", 2**31)
    for split in (1, 2):
        o = integers(case).to(torch.float32)
        got = run(o, case, text(configs.Config(32, 64, 32, 4, 2), split))
        assert_same(got, exact(o, case).float())
    case = case.but(residual=False, groups=1)
    o, s, branch = with_shortcut(case, torch.float32)
    got = run(o, case, text(configs.Config(32, 64, 32, 4, 2), 1), **shortcut_of(s, branch))
    assert_same(got, exact_with_shortcut(o, case, s, branch).float())


GUARDED = [
    Case(1, 5, 5, 6, 9, (3, 3), padding=ONE),
    Case(2, 34, 4, 3, 17, (3, 3), stride=TWO, padding=ONE),
    Case(1, 3, 9, 9, 20, (7, 7), stride=TWO, padding=(3, 3)),
    Case(1, 15, 5, 5, 6, (3, 3), padding=ONE, groups=3),
    Case(1, 64, 3, 5, 70, (1, 1), stride=TWO),
]


@pytest.mark.parametrize("at_end", [True, False], ids=["behind", "before"])
@pytest.mark.parametrize("case", GUARDED, ids=str)
def test_nothing_beyond_a_tensor_is_touched(case, at_end, monkeypatch):
    """Every tensor, the output and shared sums too, lies at the edge of memory that exists."""
    plain = torch.empty

    def empty(*args, **keywords):
        return guarded(plain(*args, **keywords), at_end)

    joined = case.but(residual=False, groups=1)
    for swap, split, dtype in ((False, 1, DTYPES[0]), (True, 1, DTYPES[1]), (False, 2, DTYPES[1])):
        config = text(configs.Config(32, 64, 32, 4, 2, swap=swap), split)
        o = integers(case).to(dtype)
        want = exact(o, case).to(dtype)
        images = [channels_last(o.x), channels_last(o.weight), o.scale, o.shift]
        tensors = [guarded(t, at_end) for t in [*images, channels_last(o.residual)]]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            got = _ops.conv_bn_act_triton(
                *tensors, kernel_size=case.kernel, config=config, **case.keywords
            )
        assert_same(got, want)
        o, s, branch = with_shortcut(joined, dtype, channels=7)
        want = exact_with_shortcut(o, joined, s, branch).to(dtype)
        images = [channels_last(o.x), channels_last(o.weight), o.scale, o.shift]
        shortcut = [channels_last(s.x), channels_last(s.weight), s.scale, s.shift]
        tensors = [*(guarded(t, at_end) for t in images), None]
        tensors += [guarded(t, at_end) for t in shortcut]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            got = _ops.conv_bn_act_triton(
                *tensors,
                kernel_size=case.kernel,
                shortcut_stride=branch.stride,
                config=config,
                **joined.keywords,
            )
        assert_same(got, want)


@pytest.mark.parametrize("at_end", [True, False], ids=["behind", "before"])
def test_add_relu_touches_nothing_beyond(at_end):
    for dtype in DTYPES:
        a, b = (guarded(torch.randn(5001).to(dtype), at_end) for _ in range(2))
        assert_same(_ops.add_relu_triton(a, b), (a + b).relu())


def test_no_images():
    for dtype in DTYPES:
        case = square(0, 16, 5, 24, padding=ONE)
        assert run(normals(case).to(dtype), case).shape == (0, 24, 5, 5)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 5, 7, 3), (3, 1000), (70_001,), ()])
def test_add_relu(shape):
    for dtype in DTYPES:
        a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        if a.numel():
            a.view(-1)[0], b.view(-1)[-1] = math.nan, math.inf
        layouts = [a, b]
        if a.dim() == 4:
            layouts.append(b.to(memory_format=torch.channels_last))
        for left, right in itertools.permutations(layouts, 2):
            got = _ops.add_relu_triton(left, right)
            assert_same(got, (left + right).relu())
            want = torch.empty_like(left) if left.numel() else torch.empty(shape)
            assert got.stride() == want.stride()


def test_a_fused_net_runs_on_triton():
    """The plan through select, packing, fuse and report."""
    net = small_net()
    fused = rf.fuse(net)
    x = torch.randn(2, 3, 32, 25)
    with torch.no_grad(), select.forced("triton"):
        got = fused(x)
        assert {row.backend for row in rf.report(fused)} == {"triton"}
        want = net.double()(x.double())
    assert (got.double() - want).norm() <= 2e-6 * want.norm()


def test_a_shortcut_is_joined_with_its_blocks_last_convolution(monkeypatch):
    block = randomize(rf.FusedResidual(8, 16, use_1x1conv=True, strides=2)).eval()
    calls = []
    kind = _triton._kernels().Conv
    plain = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda c, o: (calls.append(c.problem), plain(c, o))[1])
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad(), select.forced("triton"):
        got = block(x)
        want = block.original()(x)
    torch.testing.assert_close(got, want)
    assert [problem.shortcut is not None for problem in calls] == [False, True]


BLOCKS = {
    "identity": lambda: rf.FusedResidual(8, 8),
    "joined": lambda: rf.FusedResidual(8, 16, use_1x1conv=True, strides=2),
    "bottleneck": lambda: rf.FusedBottleneck(16, 4),
    "bottleneck_joined": lambda: rf.FusedBottleneck(8, 4, use_1x1conv=True, strides=2),
    "stem": lambda: rf.fuse(
        nn.Sequential(
            *(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        )
    ),
}


@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
def test_repeated_calls_are_launches_only(build, monkeypatch):
    """The second call looks at facts, not at modules; a change starts from the beginning."""
    torch.manual_seed(0)
    module = randomize(build()).eval()
    first = module if isinstance(module, FusedModule) else module[0]
    calls = []
    plain = type(first)._forward
    monkeypatch.setattr(FusedModule, "_forward", lambda m, x: (calls.append(1), plain(m, x))[1])
    with torch.no_grad(), select.forced("triton"):
        for seed in range(3):
            x = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(seed))
            if first._units[0].conv.weight.shape[1] == 16:
                x = torch.cat([x, x], 1)
            got = module(x.to(memory_format=torch.channels_last) if seed else x)
            with select.forced("torch"):
                want = copy.deepcopy(module)(x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert got.stride() == want.stride()
        del calls[:]
        module(x)
        assert not calls
        first._units[0].conv.weight.mul_(2)
        changed = module(x)
        assert calls
        with select.forced("torch"):
            torch.testing.assert_close(changed, copy.deepcopy(module)(x), rtol=1e-5, atol=1e-5)
        assert module(x[:1]).shape[0] == 1
        assert module(x[:0]).shape[0] == 0


def test_every_chosen_configuration_is_swept():
    """The rule takes no tile that is not in the list above."""
    from test_triton_plans import PROBLEMS

    tiles = {replace(tile, depth=0) for tile in configs.TILES}
    for problem, device in itertools.product(PROBLEMS, KNOWN.values()):
        assert replace(configs.choose(problem, device), depth=0, split=1) in tiles


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("fast", "config must be like"),
        ("128x64x64 warps 3 stages 2", "config must have powers of two"),
        ("8x64x64 warps 4 stages 2", "tiles from 16"),
    ],
)
def test_unknown_configurations(config, message):
    case = SMALL[0]
    with pytest.raises(RuntimeError, match=message):
        run(normals(case).to(torch.float32), case, config)
