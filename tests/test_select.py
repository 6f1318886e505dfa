"""The choice of a plan: the rule, what overrides it, and the sentence that says why."""

import os
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from resnet_fused import _cuda_rule, _extension, backends, check, guard, select

needs_extension = pytest.mark.skipif(
    _extension.extension_error is not None, reason=str(_extension.extension_error)
)

STAGE_1 = select.ConvShape("cpu", torch.float32, 64, 64, (3, 3), (56, 56))


def plan(**changes):
    return select.choose(replace(STAGE_1, **changes)).plan


@pytest.fixture(autouse=True)
def _no_force():
    with select.forced("none"):
        yield


@needs_extension
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "winograd4"),
        ({"in_channels": 512, "out_channels": 512, "out_size": (1, 1)}, "direct"),
        ({"out_size": (2, 2)}, "direct"),
        ({"stride": (2, 2)}, "winograd4s2"),
        ({"stride": (2, 2), "out_size": (1, 1)}, "direct"),
        ({"dilation": (2, 2)}, "direct"),
        ({"kernel": (1, 1)}, "direct"),
        ({"groups": 2}, "direct"),
        ({"groups": 64}, "torch"),
        ({"dtype": torch.float64}, "torch"),
        ({"device": "cuda"}, "torch"),
    ],
)
def test_rule(changes, expected):
    assert plan(**changes) == expected


@needs_extension
def test_rule_knows_what_the_cpu_multiplies_fast(monkeypatch):
    for isa, features, expected in (
        ("avx512", (), "winograd4"),
        ("avx512bf16", (), "winograd2_bf16"),
        ("avx512bf16", ("amx_bf16",), "torch"),
    ):
        monkeypatch.setattr(_extension, "CPU_FEATURES", frozenset(features))
        monkeypatch.setattr(_extension, "cpu_isa", lambda isa=isa: isa)
        assert plan(dtype=torch.bfloat16) == expected
        assert plan() == "winograd4"


STAGE_3 = {"in_channels": 256, "out_channels": 256, "out_size": (14, 14)}
STAGE_4 = {"in_channels": 512, "out_channels": 512, "out_size": (7, 7)}


@needs_extension
@pytest.mark.parametrize(
    ("isa", "dtype", "changes", "expected"),
    [
        # Few tiles: their products must hide the loading of the weights, and F(4x4) has more.
        ("avx2", torch.float32, STAGE_4 | {"batch": 1}, "winograd2"),
        ("avx512", torch.float32, STAGE_4 | {"batch": 1}, "winograd4_raw"),
        ("avx512", torch.float32, STAGE_4 | {"batch": 2}, "winograd4_raw"),
        ("avx512", torch.float32, STAGE_4 | {"batch": 8}, "winograd4"),
        ("avx512", torch.float32, STAGE_3 | {"batch": 1}, "winograd4"),
        ("avx2", torch.float32, STAGE_4 | {"batch": 8}, "winograd4"),
        ("avx512", torch.float32, STAGE_4 | {"batch": 1, "stride": (2, 2)}, "direct"),
        ("avx512", torch.float32, STAGE_4 | {"batch": 8, "stride": (2, 2)}, "winograd4s2"),
        ("avx512", torch.float16, {"stride": (2, 2)}, "winograd4s2"),
        ("avx512", torch.bfloat16, {"stride": (2, 2)}, "winograd4s2"),
        # Products of bfloat16 take half the time wherever there are some.
        ("avx512bf16", torch.float32, {}, "winograd4"),
        ("avx512bf16", torch.float16, {}, "winograd4"),
        ("avx512bf16", torch.bfloat16, {}, "winograd2_bf16"),
        ("avx512bf16", torch.bfloat16, {"stride": (2, 2)}, "winograd2s2_bf16"),
        ("avx512bf16", torch.bfloat16, {"kernel": (1, 1)}, "direct_bf16"),
        ("avx512bf16", torch.bfloat16, {"groups": 2}, "direct_bf16"),
        ("avx512bf16", torch.bfloat16, {"out_size": (1, 1)}, "direct_bf16"),
        ("avx512bf16", torch.bfloat16, STAGE_4 | {"batch": 8}, "winograd2_bf16"),
    ],
)
def test_rule_by_batch_and_instruction_set(isa, dtype, changes, expected, monkeypatch):
    """Of any CPU, whichever this one is."""
    monkeypatch.setattr(_extension, "CPU_FEATURES", frozenset())
    monkeypatch.setattr(_extension, "cpu_isa", lambda: isa)
    assert select.by_rule(replace(STAGE_1, dtype=dtype, **changes)).plan == expected


@needs_extension
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "winograd4"),
        (STAGE_4 | {"batch": 1}, "winograd2"),
        ({"stride": (2, 2)}, "torch"),
        ({"kernel": (1, 1)}, "torch"),
        # The weights, which PyTorch moves around with every call, are more than the products.
        ({"kernel": (1, 1), "out_size": (1, 1)}, "direct"),
    ],
)
def test_kernels_without_pairs_leave_them_to_pytorch(changes, expected, monkeypatch):
    """Where Winograd saves less than pairs of bfloat16 do, on a CPU that has these."""
    monkeypatch.setattr(_extension, "cpu_isa", lambda: "avx2")
    monkeypatch.setattr(_extension, "CPU_FEATURES", frozenset({"avx512bf16"}))
    shape = replace(STAGE_1, dtype=torch.bfloat16, **changes)
    choice = select.by_rule(shape)
    assert choice.plan == expected
    assert ("pairs of bfloat16" in choice.reason) == (expected == "torch")
    exact = select.by_rule(shape, exact_nonfinite=True).plan
    assert exact == ("direct" if expected == "direct" else "torch")
    assert select.by_rule(shape, ours=True).plan != "torch"
    assert select.by_rule(replace(shape, dtype=torch.float16)).plan != "torch"
    monkeypatch.setattr(_extension, "CPU_FEATURES", frozenset({"avx2"}))
    assert select.by_rule(shape).plan != "torch"


@needs_extension
@pytest.mark.parametrize("dtype", check.FLOAT_DTYPES)
def test_the_rule_takes_nothing_that_must_be_asked_for(dtype, isa):
    for size, batch, stride in [(1, 1, 1), (7, 1, 1), (7, 32, 2), (56, 1, 1), (56, 32, 2)]:
        changes = {"out_size": (size, size), "batch": batch, "stride": (stride, stride)}
        for ours in (False, True):
            shape = replace(STAGE_1, dtype=dtype, **changes)
            chosen = select.by_rule(shape, ours=ours).plan
            assert chosen in select.candidates(shape)
            exact = select.by_rule(shape, ours=ours, exact_nonfinite=True).plan
            assert not check.PLAN_TRAITS[exact].spreads


@needs_extension
def test_a_shape_that_is_none():
    with pytest.raises(TypeError, match=r"^choose: shape must be a ConvShape, got int$"):
        select.choose(3)


def test_exact_nonfinite_wins_over_winograd():
    choice = select.choose(STAGE_1, exact_nonfinite=True)
    assert choice.plan == "direct"
    assert "exact_nonfinite" in choice.reason
    with select.forced("winograd4"):
        assert select.choose(STAGE_1).plan == "winograd4"
        assert select.choose(STAGE_1, exact_nonfinite=True).plan == "direct"


ON_GPU = replace(STAGE_1, device="cuda", dtype=torch.bfloat16)


@pytest.fixture
def gpu(monkeypatch):
    """As if a GPU were there, with the kernels of some plans."""

    def serve(*plans, tf32=True):
        def missing(plan, device, index=0):
            return "" if plan in ("torch", *plans) else f"there is no {plan} kernel for sm_75"

        monkeypatch.setattr(backends, "missing", missing)
        for module in (backends, _cuda_rule):
            monkeypatch.setattr(module, "uses_tf32", lambda: tf32)

    return serve


@pytest.mark.parametrize(
    ("plans", "changes", "expected", "reason"),
    [
        (("triton", "cuda"), {}, "cuda", "implicit GEMM on tensor cores"),
        (("triton", "cuda"), {"dtype": torch.float16}, "cuda", "implicit GEMM on tensor cores"),
        (("triton", "cuda"), {"groups": 4}, "cuda", "implicit GEMM on tensor cores"),
        (("triton", "cuda"), {"dtype": torch.float32}, "triton", "implicit GEMM on tensor cores"),
        (("cuda",), {}, "cuda", "implicit GEMM on tensor cores"),
        (("cuda",), {"dtype": torch.float32}, "cuda",
         "implicit GEMM on tensor cores; there is no triton kernel for sm_75"),
        (("triton",), {}, "triton",
         "implicit GEMM on tensor cores; there is no cuda kernel for sm_75"),
        ((), {}, "torch", "there is no cuda kernel for sm_75; there is no triton kernel for sm_75"),
        (("triton",), {"dtype": torch.float16}, "triton", "implicit GEMM"),
        (("triton",), {"dtype": torch.float64}, "torch", "float64 runs on PyTorch's convolution"),
        (("triton",), {"dtype": torch.float32}, "triton", "implicit GEMM"),
        (("triton",), {"groups": 64}, "torch", "1 channels a group are fewer than a tensor core"),
        (("triton",), {"groups": 4}, "triton", "implicit GEMM"),
        (("triton", "cuda"), {"batch": 9900}, "cuda", "implicit GEMM on tensor cores"),
        (("triton", "cuda"), {"batch": 10700}, "triton",
         "implicit GEMM on tensor cores; a map of 2**31 elements or more is beyond"),
        (("triton", "cuda"), {"batch": 2700, "stride": (2, 2)}, "triton", "implicit GEMM"),
        (("triton", "cuda"), {"batch": 2700, "stride": (2, 2), "kernel": (1, 1),
                              "in_channels": 256, "out_size": (28, 28)}, "triton", "implicit GEMM"),
        (("cuda",), {"batch": 10700}, "torch",
         "a map of 2**31 elements or more is beyond the CUDA C++ kernels; there is no triton"),
    ],
)  # fmt: skip
def test_rule_on_a_gpu(gpu, plans, changes, expected, reason):
    gpu(*plans)
    choice = select.choose(replace(ON_GPU, **changes))
    assert choice.plan == expected
    assert choice.reason.startswith(reason)
    assert choice.backend == expected


def test_float32_on_a_gpu_without_tf32_is_pytorchs(gpu):
    gpu("triton", tf32=False)
    choice = select.choose(replace(ON_GPU, dtype=torch.float32))
    assert choice.plan == "torch"
    assert choice.reason.startswith("float32 without TF32 has no tensor cores")
    assert select.choose(ON_GPU).plan == "triton"


def test_forces_on_a_gpu(gpu):
    gpu("triton")
    for word, expected in (
        ("ours", "triton"),
        ("triton", "triton"),
        ("torch", "torch"),
        ("cuda", "triton"),  # not there
        ("winograd4", "triton"),  # of the CPU
    ):
        with select.forced(word):
            assert select.choose(replace(ON_GPU, groups=64)).plan == expected
    assert select.candidates(ON_GPU) == ("triton", "torch")
    gpu()
    with select.forced("triton"):
        assert select.choose(ON_GPU).plan == "torch"


def test_the_choice_follows_the_tf32_flag():
    """It is part of what a module remembers its choice by."""
    before = select.state()
    precision = torch.backends.cudnn.conv.fp32_precision
    facts = guard.watch(select.facts("cuda"))
    try:
        for word in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = word
            assert backends.uses_tf32() == (word == "tf32")
            if word != precision:
                assert select.state() != before
                assert facts is None or not facts()
    finally:
        torch.backends.cudnn.conv.fp32_precision = precision


def test_without_the_extension_everything_is_torch(monkeypatch):
    monkeypatch.setattr(_extension, "extension_error", "it was not built")
    choice = select.choose(STAGE_1)
    assert choice.plan == "torch"
    assert "it was not built" in choice.reason


@needs_extension
@pytest.mark.parametrize(
    ("word", "changes", "expected"),
    [
        ("ours", {"groups": 64}, "direct"),
        ("ours", {"dtype": torch.float16}, "winograd4"),
        ("ours", {"dtype": torch.float64}, "torch"),
        ("torch", {}, "torch"),
        ("direct", {}, "direct"),
        ("winograd2", {}, "winograd2"),
        ("winograd2", {"stride": (2, 2)}, "direct"),
        ("winograd5", {}, "winograd5"),
        ("winograd2_bf16", {}, "direct"),
    ],
)
def test_forced(word, changes, expected):
    with select.forced(word):
        assert select.force() == word
        assert plan(**changes) == expected
    assert select.force() == "none"


def test_forced_ends_with_its_block_on_an_exception():
    with pytest.raises(KeyError), select.forced("torch"):
        raise KeyError
    assert select.force() == "none"


def test_forced_refuses_unknown_words():
    expected = r"^forced: plan must be one of none, ours, .*got 'fast'$"
    with pytest.raises(ValueError, match=expected), select.forced("fast"):
        pass


# ---- candidates ----------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("direct", "winograd4", "winograd4_raw", "winograd2", "torch")),
        ({"dtype": torch.float16}, ("direct", "winograd4", "winograd4_raw", "winograd2", "torch")),
        (
            {"in_channels": 1, "out_size": (1, 1)},
            ("direct", "winograd4", "winograd4_raw", "winograd2", "torch"),
        ),
        ({"stride": (2, 2)}, ("direct", "winograd4s2", "winograd2s2", "torch")),
        ({"kernel": (1, 1)}, ("direct", "torch")),
        ({"kernel": (3, 1)}, ("direct", "torch")),
        ({"stride": (1, 2)}, ("direct", "torch")),
        ({"dilation": (2, 2)}, ("direct", "torch")),
        ({"groups": 2}, ("direct", "torch")),
        ({"dtype": torch.float64}, ("torch",)),
        ({"device": "cuda"}, ("torch",)),
    ],
)
def test_candidates(changes, expected):
    assert select.candidates(replace(STAGE_1, **changes)) == expected


@needs_extension
def test_candidates_of_exact_nonfinite():
    assert select.candidates(STAGE_1, exact_nonfinite=True) == ("direct", "torch")


@needs_extension
def test_opt_in_plans_are_candidates_for_those_who_ask():
    assert "winograd5" not in select.candidates(STAGE_1)
    assert "winograd5" in select.candidates(STAGE_1, allow=["winograd5"])
    one = replace(STAGE_1, kernel=(1, 1))
    assert "winograd5" not in select.candidates(one, allow=["winograd5"])


def test_candidates_follow_the_instruction_set(isa):
    low = replace(STAGE_1, dtype=torch.bfloat16)
    found = [plan for plan in select.candidates(low) if plan.endswith("_bf16")]
    assert found == (["direct_bf16", "winograd2_bf16"] if isa == "avx512bf16" else [])


def test_without_the_extension_torch_is_the_only_candidate(monkeypatch):
    monkeypatch.setattr(_extension, "extension_error", "it was not built")
    assert select.candidates(STAGE_1) == ("torch",)


@needs_extension
@pytest.mark.parametrize("geometry", [(3, 1), (3, 2), (1, 1), (7, 2)])
@pytest.mark.parametrize("dtype", check.FLOAT_DTYPES)
@pytest.mark.parametrize("groups", [1, 2])
def test_candidates_are_what_the_ops_take(geometry, dtype, groups):
    """One table for the choice and the argument checks, and what C++ says of it."""
    side, stride = geometry
    x = torch.randn(1, 4, 9, 9).to(dtype)
    weight = torch.randn(4, 4 // groups, side, side).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vector = torch.ones(4, dtype=wide)
    keywords = {"stride": (stride, stride), "groups": groups}
    y = torch.nn.functional.conv2d(x, weight, **keywords)
    shape = select.ConvShape(
        "cpu", dtype, 4, 4, (side, side), tuple(y.shape[-2:]), (stride, stride), groups=groups
    )
    for plan in check.CPU_PLANS:
        able = plan in select.candidates(shape, allow=check.CPU_PLANS)

        def run(plan=plan):
            packed = torch.ops.resnet_fused.pack_conv(weight, groups, plan=plan)
            return torch.ops.resnet_fused.conv_bn_act_packed(
                x, packed, vector, vector, kernel_size=(side, side), plan=plan, **keywords
            )

        if able:
            assert run().shape == y.shape
        else:
            with pytest.raises(RuntimeError, match=rf'plan "{plan}" (takes|needs) '):
                run()


@needs_extension
def test_a_new_plan_needs_one_row(monkeypatch):
    """Its row decides where it is a candidate and what the checks say."""
    rows = {
        "slow": check.PlanTraits(kernel=7, stride=2, opt_in=True),
        "native": check.PlanTraits(dtypes=(torch.bfloat16,), isa=_extension.cpu_isa()),
        "elsewhere": check.PlanTraits(isa="of another machine"),
    }
    for plan, row in rows.items():
        monkeypatch.setitem(check.PLAN_TRAITS, plan, row)
    monkeypatch.setattr(check, "plans_of", lambda device: (*check.CPU_PLANS, *rows))
    stem = replace(STAGE_1, kernel=(7, 7), stride=(2, 2))

    def new(shape, **keywords):
        return [plan for plan in select.candidates(shape, **keywords) if plan in rows]

    assert new(stem) == []
    assert new(stem, allow=["slow"]) == ["slow"]
    assert new(STAGE_1, allow=["slow"]) == []
    assert new(replace(stem, dtype=torch.bfloat16)) == ["native"]
    with pytest.raises(ValueError, match='"slow" takes 7 x 7 kernels in one group, got 3 x 3 in 1'):
        check.plan_weight("op", "slow", torch.float32, (3, 3), 1)
    with pytest.raises(ValueError, match=r"takes stride 2 and dilation 1, got stride \(1, 1\)"):
        check.plan_weight("op", "slow", torch.float32, (7, 7), 1, (1, 1))
    check.plan_weight("op", "slow", torch.float32, (7, 7), 1)  # packing knows of no stride
    with pytest.raises(TypeError, match='"native" takes bfloat16, got float16'):
        check.plan_weight("op", "native", torch.float16, (3, 3), 1)


def test_the_key_of_a_convolution_tells_all_that_the_choice_depends_on():
    others = {
        "device": "cuda",
        "dtype": torch.float16,
        "in_channels": 32,
        "out_channels": 32,
        "kernel": (1, 3),
        "out_size": (56, 55),
        "stride": (2, 1),
        "dilation": (1, 2),
        "groups": 2,
    }
    # On the CPU an answer does not depend on the batch, and answers are kept by processor: see
    # resnet_fused/tuned.py.
    apart = {"batch", "index"}
    assert set(others) == {field.name for field in fields(select.ConvShape)} - apart
    keys = {str(replace(STAGE_1, **{name: value})) for name, value in others.items()}
    assert len(keys | {str(STAGE_1)}) == len(others) + 1
    assert str(STAGE_1) == "3x3 64->64 to 56x56 float32 cpu"
    on_gpu = replace(STAGE_1, device="cuda", batch=8)
    assert str(on_gpu) == "3x3 64->64 to 56x56 float32 cuda batch 8"
    assert str(replace(STAGE_1, stride=(2, 2), dilation=(1, 2), groups=4)) == (
        "3x3 64->64 to 56x56 stride 2x2 dilation 1x2 groups 4 float32 cpu"
    )


@needs_extension
def test_every_choice_says_why_and_where():
    for changes in ({}, {"out_size": (1, 1)}, {"groups": 64}, {"device": "cuda"}):
        choice = select.choose(replace(STAGE_1, **changes))
        assert choice.reason
        assert choice.backend.startswith(choice.plan)


@pytest.mark.parametrize(("word", "printed"), [("torch", "torch"), ("", "none")])
def test_environment_sets_the_force(word, printed):
    done = run("from resnet_fused import select; print(select.force())", word)
    assert done.stdout.strip() == printed


def test_environment_with_an_unknown_word_is_one_sentence_at_the_first_choice():
    """Not at the import, so that the doctor can tell."""
    done = run("import resnet_fused; print('imported')", "fast")
    assert (done.returncode, done.stdout) == (0, "imported\n")
    code = (
        "import resnet_fused as rf, torch\n"
        "with rf.select.forced('torch'):\n"
        "    rf.FusedResidual(4, 4).eval()(torch.ones(1, 4, 4, 4))\n"
        "rf.FusedResidual(4, 4).eval()(torch.ones(1, 4, 4, 4))\n"
    )
    done = run(code, "fast")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        f"ValueError: RESNET_FUSED_FORCE must be one of {', '.join(select.FORCES)}, got 'fast'"
    )


def run(code, word):
    environ = {**os.environ, "RESNET_FUSED_FORCE": word}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
