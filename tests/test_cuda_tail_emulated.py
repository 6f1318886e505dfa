"""The tail's kernel, a convolution and the 1x1 behind it, run on the CPU from its own source,
against float64 with the map between rounded and, on whole numbers, bit for bit.

No GPU takes part: csrc/cuda/emulate stands for cp.async, ldmatrix and mma.sync.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from emulated_sm90 import ROOT, Conv, beyond_allowed, why_not
from emulated_tail import Tail, TailProblem, build, drawn, run, whole

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
both_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
STAGE_1 = Conv(1, 13, 11, 64, 64)  # a whole tile and 15 pixels


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return build(ROOT / "build" / "emulated")


def agrees(library: ctypes.CDLL, data: Tail, order: int = 0) -> torch.Tensor:
    y, report = run(library, data, order)
    assert not report
    assert not beyond_allowed(data, y)
    return y


# ---- every geometry ----------------------------------------------------------------------------

GEOMETRIES = (
    (STAGE_1, 256),
    (Conv(3, 7, 9, 24, 8), 72),
    (Conv(1, 9, 8, 64, 40), 264),
    (Conv(2, 8, 8, 16, 64), 8),  # whole tiles
    (Conv(2, 9, 7, 72, 72), 256),
    (Conv(1, 12, 11, 40, 128), 264),
    (Conv(2, 23, 21, 16, 48, stride=2), 64),
    (Conv(1, 15, 14, 24, 64, dilation=2), 72),
    (Conv(2, 9, 9, 64, 64, kernel=1), 256),  # two steps: the ring is longer
    (Conv(2, 9, 9, 8, 104, kernel=1), 8),  # one step
    (Conv(1, 16, 13, 16, 24, kernel=(5, 3), stride=(2, 1), padding=(0, 3), dilation=(1, 2)), 136),
    (Conv(3, 1, 1, 8, 8), 8),
    (Conv(1, 5, 6, 32, 64, kernel=(2, 4), padding=1), 128),
)


@both_types
@pytest.mark.parametrize(("conv", "k"), GEOMETRIES, ids=str)
def test_geometries(library, conv, k, dtype):
    conv = replace(conv, dtype=dtype)
    agrees(library, drawn(conv, k), order=k % 3)
    exact = whole(replace(conv, seed=1), k, last_relu=False)
    y, report = run(library, exact, order=3)
    assert not report
    assert torch.equal(y, exact.oracle.to(dtype))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("last_relu", [True, False])
def test_activations_and_residual(library, residual, relu, last_relu):
    data = drawn(replace(STAGE_1, relu=relu), 72, residual, last_relu)
    y = agrees(library, data)
    assert bool((data.between < 0).any()) is not relu
    assert bool((y < 0).any()) is not last_relu


@pytest.mark.parametrize("conv", [STAGE_1, Conv(1, 8, 19, 16, 96)], ids=str)
def test_schedules_do_not_change_a_bit(library, conv):
    data = drawn(conv, 200)
    results = [agrees(library, data, order) for order in range(5)]
    assert all(torch.equal(results[0], y) for y in results[1:])


# ---- what is not finite ------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("conv", [Conv(2, 8, 9, 16, 40), Conv(2, 8, 9, 16, 72)], ids=str)
def test_nan_and_inf_of_images(library, conv, relu):
    data = drawn(replace(conv, relu=relu), 72, last_relu=relu)
    data.x[0, 3, 2, 2] = float("nan")
    data.x[1, 3, 1, 1], data.x[1, 5, 6, 7] = torch.inf, -torch.inf
    data.residual[1, 3, 4, 0] = float("nan")
    data.residual[0, 60, 7, 8], data.residual[0, 61, 7, 8] = torch.inf, -torch.inf
    y = agrees(library, data)
    assert y.isnan().any()
    assert y.isinf().any()
    assert y.isfinite().any()


@pytest.mark.parametrize("between", [40, 72])
def test_channels_that_are_not_there_stay_zero(library, between):
    """0 * Inf of theirs is NaN; the real channels become -Inf, and the ReLU makes them zero."""
    data = drawn(Conv(1, 8, 9, 16, between), 72)
    data.weight = data.weight.abs() + 0.25
    data.scale = -data.scale.abs() - 0.5
    data.x[0, 3, 2, 2] = torch.inf
    y = agrees(library, data)
    assert data.between.isfinite().all()
    assert y.isfinite().all()


@pytest.mark.parametrize("name", ["weight", "last_weight", "scale", "last_shift", "shift"])
def test_nan_and_inf_of_parameters(library, name):
    data = drawn(Conv(2, 6, 7, 16, 24), 40)
    values = getattr(data, name)
    values.view(-1)[5], values.view(-1)[-3] = torch.inf, -torch.inf
    agrees(library, data)
    data = drawn(Conv(2, 6, 7, 16, 24), 40)
    getattr(data, name).view(-1)[7] = float("nan")
    assert agrees(library, data).isnan().any()


def test_the_map_between_is_rounded(library):
    """1 + 2^-9 becomes 1 in bfloat16, and its difference from 1 zero."""
    data = drawn(Conv(1, 4, 4, 8, 8, kernel=1), 8, residual=False, last_relu=False)
    data.x, data.weight = torch.ones_like(data.x), torch.zeros_like(data.weight)
    data.weight[:, 0] = 1.0
    data.scale, data.shift = torch.ones(8), torch.full((8,), 2.0**-9)
    data.last_weight = torch.zeros_like(data.last_weight)
    data.last_weight[:, 0] = 1.0
    data.last_scale, data.last_shift = torch.ones(8), torch.full((8,), -1.0)
    assert not run(library, data)[0].any()


# ---- the plan ----------------------------------------------------------------------------------


def why(library, problem: TailProblem) -> str:
    text = ctypes.create_string_buffer(200)
    library.tail_why_not(ctypes.byref(problem), text, 200)
    return text.value.decode()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, ""),
        ({"k": 128}, ""),
        ({"k": 136}, "KERNEL has at most 128 channels between them, got 136"),
        ({"c": 12}, "KERNEL needs channels in multiples of 8, got 12"),
        ({"k": 60}, "KERNEL needs channels in multiples of 8, got 60"),
        ({"last": 60}, "KERNEL needs channels in multiples of 8, got 60"),
        ({"groups": 2}, "KERNEL has no groups or shortcut"),
        ({"h": 2**30}, "its indices have 31 bits, and a tensor has 1099511627776 elements"),
        ({"pad_h": 2**31 - 1}, "its taps reach further than indices of 31 bits do"),
        ({"dilation_w": 2**31 - 1}, "its taps reach further than indices of 31 bits do"),
        ({"r": 9}, "the tensor is empty"),
        ({"last": 2**27}, "its indices have 31 bits, and a tensor has 12884901888 elements"),
    ],
    ids=str,
)
def test_refusals(library, change, sentence):
    problem = drawn(Conv(2, 6, 8, 64, 64), 256).problem()
    for name, value in change.items():
        setattr(*((problem, "k") if name == "last" else (problem.first, name)), value)
    assert why(library, problem) == sentence.replace("KERNEL", "its kernel for two convolutions")


def test_two_blocks_fit_in_a_multiprocessor_of_any_gpu(library):
    """sm_86 and sm_89 have 100 KiB, sm_80 164, and a block's own KiB besides."""
    assert library.tail_shared(0) <= 49 << 10
    assert library.tail_resident(0) * (library.tail_shared(0) + 1024) <= 164 << 10
    assert library.tail_shared(1) <= 99 << 10
