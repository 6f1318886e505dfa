"""The Triton kernels compiled for sm_80, sm_90 and sm_100: no spills, within shared memory, with
products on tensor cores, in every kind of launch that the rule may choose.

All kinds are read from triton_resources.txt, which check_triton.py writes; some are compiled again.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import check_triton
from check_triton import COUNTED, DEVICES
from test_triton_plans import OTHERS, RESNET_18, conv
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

from resnet_fused.triton_kernels import ahead
from resnet_fused.triton_kernels import config as configs
from resnet_fused.triton_kernels.ahead import compile_conv
from resnet_fused.triton_kernels.conv import conv_kernel
from resnet_fused.triton_kernels.plan import plan
from resnet_fused.triton_kernels.problem import Problem, Shortcut

BF16 = torch.bfloat16
ROWS = {row.kind: row for row in check_triton.rows()}
BY_ARCH = {device.arch: device for device in DEVICES}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Nothing that was compiled before, nor in the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def table():
    return check_triton.read()


def test_the_table_has_what_the_rule_may_choose(table):
    """Where it does not: python tests/check_triton.py --write."""
    assert table.keys() == ROWS.keys()


def test_no_kind_spills_or_asks_for_too_much(table):
    for kind, (registers, spilled, shared, *counts) in table.items():
        row, found = ROWS[kind], dict(zip(COUNTED, counts, strict=True))
        assert (spilled, found["LDL"], found["STL"]) == (0, 0, 0), kind
        assert registers <= 255, kind
        assert shared <= row.device.shared_bytes, kind
        planned = row.config.shared_bytes(row.problem.dtype.itemsize)
        assert shared <= planned + configs.BARRIER_BYTES, kind


def test_products_are_on_the_units_they_should_be(table):
    """wgmma takes 64 rows at least; ieee products have no tensor cores."""
    for kind, (_, _, _, *counts) in table.items():
        row, found = ROWS[kind], dict(zip(COUNTED, counts, strict=True))
        config, matrix = row.config, found["HMMA"] + found["HGMMA"] + found["UTCMMA"]
        if row.problem.precision == "ieee" and row.problem.dtype == torch.float32:
            assert matrix == 0, kind
            assert found["FFMA"] > 0, kind
            continue
        assert matrix > 0, kind
        if row.device.has_wgmma and (config.channels if config.swap else config.pixels) >= 64:
            assert found["HGMMA"] > 0 == found["HMMA"], kind


def test_loads_are_on_their_way_while_products_are_made(table):
    """By cp.async, which takes 4 bytes at least: 16-bit elements of a flat reduction are fewer."""
    for kind, (_, _, _, *counts) in table.items():
        problem, found = ROWS[kind].problem, dict(zip(COUNTED, counts, strict=True))
        flat = problem.is_flat(ROWS[kind].config.depth)
        if not (flat or (problem.is_ragged and problem.dtype.itemsize == 2)):
            assert found["LDGSTS"] > 0, kind


def _some_of(arch):
    """The stem, a layer of 64 channels, a joined shortcut, one that is shared, TF32, ieee."""
    wanted = [
        RESNET_18[0],
        replace(RESNET_18[1], batch=128),
        replace(RESNET_18[4], batch=32),
        RESNET_18[-1],
    ]
    device = BY_ARCH[arch]
    for problem in wanted:
        config = configs.choose(problem, device)
        yield check_triton.Row(
            check_triton.kind_of(problem, config, device), problem, config, device
        )


@pytest.mark.slow
@pytest.mark.parametrize("arch", BY_ARCH)
def test_the_compiler_still_says_so(table, arch):
    for row in _some_of(arch):
        registers, spilled, shared, *_ = check_triton.measure(row)
        assert spilled == 0, row.kind
        assert registers <= 255, row.kind
        assert shared <= row.device.shared_bytes, row.kind
        if ROWS[row.kind] == row:  # else the numbers are another convolution's
            assert [registers, spilled, shared] == table[row.kind][:3], row.kind


ONES = Problem(
    dtype=BF16,
    batch=1,
    in_channels=16,
    in_size=(1, 1),
    out_channels=1,
    out_size=(1, 1),
    kernel=(1, 1),
    act="none",
)


@pytest.mark.slow
@pytest.mark.parametrize("split", [1, 2])
def test_sizes_of_one_compile(split):
    """Scalars that are 1 are compiled in, and have none of a tensor's methods."""
    for problem in (
        ONES,
        replace(ONES, shortcut=Shortcut(16, (1, 1), (1, 1))),
        replace(ONES, kernel=(3, 3), padding=(1, 1), in_channels=1),
        replace(ONES, groups=2, in_channels=32, out_channels=2, residual=True),
    ):
        config = configs.Config(32, 32, 16, 4, 2, split=split)
        kernels = compile_conv(problem, plan(problem, config), (9, 0))
        assert len(kernels) == split


@pytest.mark.slow
def test_offsets_of_64_bits_compile():
    """Images beyond 2^31 elements, in the tile that the rule takes for them."""
    device = BY_ARCH["sm_90"]
    for problem in (
        conv(64, 1024, 64, batch=32, residual=True),
        conv(3, 2048, 64, 7, 2, batch=256),
        conv(64, 1024, 64, batch=32, shortcut=Shortcut(64, (1024, 1024), (1, 1))),
    ):
        launches = plan(problem, configs.choose(problem, device))
        assert launches.conv.constants["WIDE"]
        (kernel,) = compile_conv(problem, launches, device.capability)
        assert kernel.spilled == 0, problem


@pytest.mark.parametrize("problem", [*RESNET_18, *OTHERS, ONES], ids=lambda p: str(p.in_size[0]))
@pytest.mark.parametrize("split", [1, 2])
def test_what_is_compiled_is_what_a_launch_would_compile(problem, split, monkeypatch):
    """Types, constants and divisibility against Triton's own look at a launch's arguments."""
    made = []
    monkeypatch.setattr(
        ahead, "ASTSource", lambda fn, *rest: made.append((fn, *rest)) or _Stop.stop()
    )
    launches = plan(problem, configs.Config(32, 32, 32, 4, 2, split=split))
    with pytest.raises(_Stop):
        compile_conv(problem, launches, (9, 0))
    ((kernel, signature, constants, attributes),) = made
    image, wide = MockTensor(problem.dtype), MockTensor(torch.float32)
    residual = image if problem.residual and split == 1 else None
    branch = (image, image, wide, wide) if problem.shortcut else (None,) * 4
    y = image if split == 1 else wide
    arguments = [image, image, wide, wide, residual, *branch, y, *launches.conv.values]
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": 4, "num_stages": 2}
    bound, specialization, _ = bind(*arguments, **options)
    _, *want = kernel._pack_args(backend, options, bound, specialization, options)
    assert kernel is conv_kernel
    assert signature == want[0]
    assert constants == want[1]
    assert attributes == {at: facts for at, facts in want[2].items() if facts}


class _Stop(Exception):
    """Before anything is compiled."""

    @classmethod
    def stop(cls):
        raise cls
