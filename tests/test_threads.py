"""Several Python threads at once, any number of PyTorch's own: the same bits every time."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    Case,
    assert_same,
    assert_whole,
    exact,
    fused,
    integers,
    normals,
    randomize,
)

import resnet_fused as rf
from resnet_fused import check, packing, select

pytestmark = [pytest.mark.kernels, pytest.mark.threads]

CASES = [
    Case(2, 64, 14, 14, 64, (3, 3), padding=(1, 1)),
    Case(1, 100, 9, 9, 130, (3, 3), padding=(1, 1)),
    Case(1, 3, 40, 40, 48, (7, 7), stride=(2, 2), padding=(3, 3)),
    Case(1, 256, 5, 5, 96, (1, 1)),
    Case(4, 32, 7, 6, 48, (3, 3), stride=(2, 2), padding=(1, 1), groups=2),
    Case(1, 640, 3, 3, 33, (3, 3), padding=(1, 1)),
    Case(1, 48, 11, 12, 70, (3, 3), stride=(2, 2), padding=(1, 1)),
]


def in_threads(count, work):
    """work(i) in `count` threads that start together; their results."""
    gate = threading.Barrier(count)

    def run(i):
        gate.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def operands_for(plan, case):
    """In a dtype that the plan computes; one that cannot compute the shape gives way to direct."""
    return normals(case).to(check.PLAN_TRAITS[plan].dtypes[0])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("word", check.CPU_PLANS)
def test_several_threads_with_different_shapes(word, count, threads):
    """Scratch memory is a thread's own: growing and reused shapes do not disturb each other."""
    threads(count)
    operands = [operands_for(word, case) for case in CASES]
    with select.forced(word):
        want = [
            rf.ops.conv_bn_act(*o.args(), **case.keywords)
            for o, case in zip(operands, CASES, strict=True)
        ]

        def work(i):
            torch.set_num_threads(count)
            found = []
            for step in range(12):
                at = (i + step) % len(CASES)
                o, case = operands[at], CASES[at]
                found.append((at, rf.ops.conv_bn_act(*o.args(), **case.keywords)))
            return found

        for results in in_threads(6, work):
            for at, y in results:
                assert_same(y, want[at], f"({CASES[at]})")


@pytest.mark.parametrize("word", [plan for plan in check.CPU_PLANS if plan != "torch"])
def test_bits_do_not_depend_on_when_a_job_runs(word, threads):
    """No atomics, no order of arrival: ten runs with the same number of threads agree."""
    for count in (1, 2, 4):
        threads(count)
        for case in CASES:
            o = operands_for(word, case)
            first = fused(o, case, word)
            for _ in range(5):
                assert_same(fused(o, case, word), first, f"({count} threads, {case})")


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_thread_count_is_right(count, dtype, threads):
    threads(count)
    for case in CASES:
        o = integers(case).to(dtype)
        want = exact(o, case)
        for plan in case.plans(dtype):
            assert_whole(fused(o, case, plan), want, plan, case)


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_epilogue_behind_pytorchs_convolution_in_parts(count, dtype, isa, threads):
    """Large enough that every thread gets a part of the pixels."""
    threads(count)
    for k in (24, 33):
        case = Case(3, 4, 70, 41, k, (1, 1))
        o = integers(case).to(dtype)
        assert_same(fused(o, case, "torch"), exact(o, case).to(dtype))


def test_add_relu_and_hashes_in_several_threads(threads):
    """Large enough that each is cut into parts for PyTorch's threads."""
    threads(2)
    images = [torch.randn(2, 24, 40, 40, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    weights = [torch.randn(256, 512), torch.randn(512, 300)]
    sums = [(x + x.flip(0)).clamp_min(0) for x in images]
    hashes = [torch.ops.resnet_fused.content_hash([w]) for w in weights]

    def work(i):
        torch.set_num_threads(2)
        x, w = images[i % 2], weights[i % 2]
        return [
            (i % 2, rf.ops.add_relu(x, x.flip(0)), torch.ops.resnet_fused.content_hash([w]))
            for _ in range(10)
        ]

    for results in in_threads(4, work):
        for at, y, found in results:
            assert_same(y, sums[at])
            assert found == hashes[at]


@pytest.mark.parametrize("count", [1, 2])
def test_one_module_in_several_threads(count, threads):
    """A server: one model, many callers, the first calls pack at the same time."""
    threads(count)
    torch.manual_seed(0)
    block = randomize(rf.FusedResidual(32, 48, use_1x1conv=True, strides=2)).eval()
    # Of one batch: plans follow the largest that came, and threads come in any order.
    images = [torch.randn(2, 32, h, w) for h, w in ((9, 9), (20, 17), (33, 40), (5, 4))]
    with torch.no_grad():
        want = [copy.deepcopy(block)(x) for x in images]

    def work(i):
        torch.set_num_threads(count)
        with torch.no_grad():
            return [(at % 4, block(images[at % 4])) for at in range(i, i + 12)]

    for _ in range(3):
        block.drop_packed()
        for results in in_threads(6, work):
            for at, y in results:
                assert_same(y, want[at])


def test_first_calls_that_come_together_pack_once(monkeypatch):
    block = randomize(rf.FusedResidual(8, 8)).eval()
    x = torch.randn(1, 8, 6, 6)
    packed = []

    def pack(unit, *arguments, pack=packing.pack):
        packed.append(unit)
        time.sleep(0.05)  # in which the others come
        return pack(unit, *arguments)

    monkeypatch.setattr(packing, "pack", pack)

    def work(i):
        with torch.no_grad():
            return block(x)

    results = in_threads(4, work)
    assert packed == list(block._units)
    for y in results:
        assert_same(y, results[0])


def test_contexts_of_threads_are_their_own():
    """Autocast and gradients are settings of a thread; one model serves them side by side."""
    torch.manual_seed(0)
    block = randomize(rf.FusedResidual(16, 16)).eval()
    x = torch.randn(1, 16, 12, 12)

    def call(kind):
        if kind == 0:
            with torch.no_grad():
                return block(x)
        if kind == 1:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                return block(x)
        if kind == 2:
            with torch.inference_mode():
                return block(x).clone()
        return block(x).detach()

    want = [call(kind) for kind in range(4)]
    assert want[1].dtype == torch.bfloat16
    for results in in_threads(4, lambda i: [call(i) for _ in range(20)]):
        for y in results:
            assert any(y.dtype == w.dtype and torch.equal(y, w) for w in want)
    for i, results in enumerate(in_threads(4, lambda i: [call(i) for _ in range(5)])):
        for y in results:
            assert_same(y, want[i])


def test_training_in_one_thread_and_evaluating_a_copy_in_another():
    torch.manual_seed(0)
    block = randomize(rf.FusedResidual(8, 8))
    x = torch.randn(2, 8, 9, 9)
    frozen = copy.deepcopy(block).eval()
    with torch.no_grad():
        want = frozen(x)

    def work(i):
        if i == 0:
            optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
            for _ in range(10):
                optimizer.zero_grad()
                block(x).square().mean().backward()
                optimizer.step()
            return []
        with torch.no_grad():
            return [frozen(x) for _ in range(30)]

    for y in in_threads(2, work)[1]:
        assert_same(y, want)


def test_global_settings_of_torch_are_left_alone():
    """No flag, no default, no random number."""

    def flags():
        return (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.mkldnn.is_available(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.enabled,
            torch.get_float32_matmul_precision(),
            torch.get_rng_state().sum().item(),
            torch.is_autocast_enabled("cpu"),
            torch.get_flush_denormal() if hasattr(torch, "get_flush_denormal") else None,
        )

    block = randomize(rf.FusedResidual(16, 16)).eval()
    x = torch.randn(1, 16, 20, 20)
    before = flags()
    with torch.no_grad():
        for word in check.CPU_PLANS:
            with select.forced(word):
                block(x)
    block(x).sum().backward()
    rf.report(rf.fuse(block), x)
    assert flags() == before
