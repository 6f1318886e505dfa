"""From tensors to launches on a GPU that is not here: what a driver would get, in which order.

The kernels stand for themselves by their signatures only: what they compute is tested in
interpreted_triton.py, what they compile to in test_triton_ahead.py.
"""

from __future__ import annotations

import pytest
import torch
from test_triton_plans import conv

pytest.importorskip("triton")

from resnet_fused.triton_kernels import config as configs
from resnet_fused.triton_kernels import launch
from resnet_fused.triton_kernels.add_relu import add_relu_kernel
from resnet_fused.triton_kernels.conv import conv_kernel, reduce_kernel
from resnet_fused.triton_kernels.device import KNOWN
from resnet_fused.triton_kernels.plan import plan
from resnet_fused.triton_kernels.problem import Shortcut

BF16 = torch.bfloat16
SHORTCUT = Shortcut(8, (8, 8), (2, 2))


class Kernel:
    """In a kernel's place: keeps what it was launched with, by name."""

    def __init__(self, kernel, launches):
        self.name, self.names, self.launches = kernel.fn.__name__, kernel.arg_names, launches
        self.compiled = 0

    def __getitem__(self, grid):
        def run(*arguments, num_warps, num_stages):
            self.compiled += 1
            self._keep(grid, arguments, num_warps=num_warps, num_stages=num_stages)
            return _Compiled(self)

        return run

    def _keep(self, grid, arguments, **options):
        assert len(arguments) == len(self.names)
        given = dict(zip(self.names, arguments, strict=True))
        self.launches.append((self.name, grid, given, options))


class _Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel._keep(grid, arguments)


@pytest.fixture
def launches(monkeypatch):
    """What is launched, on an H200 by its description; the current GPU is 0."""
    made = []
    for name, kernel in (
        ("conv_kernel", conv_kernel),
        ("reduce_kernel", reduce_kernel),
        ("add_relu_kernel", add_relu_kernel),
    ):
        monkeypatch.setattr(launch, name, Kernel(kernel, made))
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_facts_of", lambda device: KNOWN["NVIDIA H200"])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launch.conv.cache_clear()
    yield made
    launch.conv.cache_clear()


def operands(problem):
    """Tensors of a problem, none of which is another one's equal."""
    images = {"dtype": problem.dtype}
    x = torch.ones(problem.batch, problem.in_channels, *problem.in_size, **images)
    k = problem.out_channels
    weight = torch.ones(k, problem.group_in, *problem.kernel, **images)
    residual = torch.ones(problem.batch, k, *problem.out_size, **images)
    branch = [None] * 4
    if problem.shortcut:
        other = torch.ones(problem.batch, problem.shortcut.channels, *problem.shortcut.size)
        rows = torch.ones(k, problem.shortcut.channels, 1, 1, **images)
        branch = [other.to(problem.dtype), rows, torch.ones(k), torch.ones(k)]
    images = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight)]
    given = residual if problem.residual else None
    return [*images, torch.ones(k), torch.ones(k), given, *branch]


NAMES = (
    *("x_ptr", "weight_ptr", "scale_ptr", "shift_ptr", "residual_ptr"),
    *("shortcut_x_ptr", "shortcut_weight_ptr", "shortcut_scale_ptr", "shortcut_shift_ptr"),
)
PROBLEMS = [
    conv(16, 7, 24, residual=True, batch=2),
    conv(16, 4, 24, shortcut=SHORTCUT, batch=2),
    conv(3, 21, 24, 7, 2, batch=2),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["residual", "shortcut", "stem"])
@pytest.mark.parametrize("split", [1, 4])
def test_each_argument_has_its_place(launches, problem, split):
    config = f"32x32x32 warps 4 stages 4{f' split {split}' if split > 1 else ''}"
    given = operands(problem)
    y = launch.Conv(problem, torch.device("cpu"), config)(given)
    assert (y.shape, y.dtype) == ((problem.batch, 24, *problem.out_size), BF16)
    assert y.is_contiguous(memory_format=torch.channels_last)
    by_name = dict(zip(NAMES, given, strict=True))
    want = plan(problem, configs.parse(config))

    name, grid, got, options = launches[0]
    assert (name, grid) == ("conv_kernel", want.conv.grid)
    assert options == {"num_warps": 4, "num_stages": 4}
    for argument, tensor in by_name.items():
        here = None if argument == "residual_ptr" and split > 1 else tensor
        assert got[argument] is here, argument
    assert {name: got[name] for name in want.conv.scalars} == want.conv.scalars
    assert {name: got[name] for name in want.conv.constants} == want.conv.constants

    if split == 1:
        assert len(launches) == 1
        assert got["y_ptr"].data_ptr() == y.data_ptr()
        return
    parts = got["y_ptr"]
    assert (parts.shape, parts.dtype) == ((split, problem.pixels, 24), torch.float32)
    name, grid, got, options = launches[1]
    assert (name, grid) == ("reduce_kernel", want.reduce.grid)
    assert got["sums_ptr"] is parts
    assert got["y_ptr"].data_ptr() == y.data_ptr()
    for argument in ("scale_ptr", "shift_ptr", "residual_ptr"):
        assert got[argument] is by_name[argument], argument
    for argument in ("shortcut_scale_ptr", "shortcut_shift_ptr"):
        assert got[argument] is by_name[argument], argument
    assert got["count"] == problem.pixels * 24
    assert {name: got[name] for name in want.reduce.constants} == want.reduce.constants


def test_a_repeated_call_launches_what_was_compiled(launches):
    problem = PROBLEMS[0]
    given = operands(problem)
    convolve = launch.conv(problem, torch.device("cpu"), "32x32x32 warps 4 stages 4 split 2")
    for _ in range(3):
        convolve(given)
    assert launch.conv_kernel.compiled == launch.reduce_kernel.compiled == 1
    assert [name for name, *_ in launches] == ["conv_kernel", "reduce_kernel"] * 3
    first, again = launches[0], launches[4]
    assert first[1] == again[1]
    assert again[3] == {}
    for argument in set(first[2]) - {"y_ptr"}:
        assert first[2][argument] is again[2][argument], argument


def test_tensors_off_any_alignment_are_looked_at_anew(launches):
    """Kernels that are kept load 16 bytes at a time."""
    problem = PROBLEMS[0]
    aligned = operands(problem)
    flat = torch.ones(problem.batch * problem.in_channels * 49 + 1, dtype=BF16)
    shifted = [flat[1:].view(problem.batch, 7, 7, -1).permute(0, 3, 1, 2), *aligned[1:]]
    assert shifted[0].data_ptr() % 16
    convolve = launch.conv(problem, torch.device("cpu"), "32x32x32 warps 4 stages 4")
    for count, given in enumerate([shifted, shifted, aligned], 1):
        convolve(given)
        assert launch.conv_kernel.compiled == count
    convolve(aligned)
    assert launch.conv_kernel.compiled == 3
    convolve(shifted)
    assert launch.conv_kernel.compiled == 4


def test_each_gpu_and_dtype_has_its_own_kernels(launches, monkeypatch):
    convolve = launch.conv(PROBLEMS[0], torch.device("cpu"), "32x32x32 warps 4 stages 4")
    convolve(operands(PROBLEMS[0]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    convolve(operands(PROBLEMS[0]))
    assert launch.conv_kernel.compiled == 2
    for dtype in (BF16, torch.float32, BF16):
        launch.add_relu(*(torch.ones(5000, dtype=dtype) for _ in range(3)))
    assert launch.add_relu_kernel.compiled == 2


def test_add_relu_covers_everything(launches):
    a, b, y = (torch.ones(5000) for _ in range(3))
    launch.add_relu(a, b, y)
    name, grid, got, _ = launches[0]
    assert (name, grid) == ("add_relu_kernel", (2, 1, 1))
    assert got["BLOCK"] * grid[0] >= got["count"] == 5000
    for argument, tensor in (("a_ptr", a), ("b_ptr", b), ("y_ptr", y)):
        assert got[argument] is tensor


def test_the_rule_chooses_where_no_configuration_is_given(launches):
    problem = conv(512, 7, 64, batch=1)
    launch.Conv(problem, torch.device("cpu"))(operands(problem))
    want = configs.choose(problem, KNOWN["NVIDIA H200"])
    assert want.split > 1
    assert launches[0][2]["SPLIT"] == want.split
    assert launches[0][1] == plan(problem, want).conv.grid


def test_pixels_that_cannot_be_counted_are_refused(launches):
    problem = conv(1, 2**16, 1, 1, batch=1)
    with pytest.raises(ValueError, match="at most 2147482624 pixels, got 4294967296"):
        launch.Conv(problem, torch.device("cpu"))
