"""tune and the choice by what it measured. Times are made up: nothing depends on a clock."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import KERNEL_DTYPES, assert_same, needs_extension, randomize
from torch import nn

import resnet_fused as rf
from resnet_fused import _extension, _fused, _tuning_file, select, tuned
from resnet_fused._tuning_file import Answer
from resnet_fused.measure import candidates
from resnet_fused.measure.timing import Samples
from resnet_fused.tune import Tuning

X = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(1))
SHAPE = select.ConvShape("cpu", torch.float32, 16, 16, (3, 3), (12, 12))
KEY = "3x3 16->16 to 12x12 float32 cpu"
# No plan of the rule: torch first, then direct.
TORCH_FIRST = {
    "torch": 1e-3,
    "direct": 2e-3,
    "winograd2": 3e-3,
    "winograd4": 4e-3,
    "winograd4_raw": 5e-3,
}
REASON = (
    "tuned on this machine at batch 2: torch 1 ms, direct 2 ms, winograd2 3 ms, winograd4 4 ms, "
    "winograd4_raw 5 ms"
)

pytestmark = needs_extension


@pytest.fixture(autouse=True)
def _own_file(tuning_file):
    """Nothing learned here reaches another test."""
    with select.forced("none"):
        yield


@pytest.fixture
def clock(monkeypatch):
    """Sets what every plan's time is, in seconds; returns the plans timed, one tuple a shape."""
    timed = []

    def set_times(times=TORCH_FIRST, rounds=10):
        def interleave(runners, *, on_round, **kwargs):
            timed.append(tuple(runners))
            for runner in runners.values():
                runner.run()
            on_round(1, 1)
            return {plan: Samples((times.get(plan, 9e-3),) * rounds) for plan in runners}

        monkeypatch.setattr(candidates, "interleave", interleave)
        return timed

    set_times()
    return set_times


def block(channels=16, **kwargs):
    torch.manual_seed(0)
    return randomize(rf.FusedResidual(channels, channels, **kwargs)).eval()


def plans(module):
    """The plans that the module's next call on X runs."""
    with torch.no_grad():
        module(X)
    return [unit.choice.plan for unit in module._cache.held()]


def learn(ms, plan="", batch=2, shape=SHAPE):
    plan = plan or min((p for p in ms if ms[p]), key=ms.get)
    tuned.learn({str(shape): Answer(batch, plan, ms)})


ALL = {"direct": 4.0, "winograd4": 3.0, "winograd4_raw": 5.0, "winograd2": 2.0, "torch": 1.0}


# ---- tune ----------------------------------------------------------------------------------------


def test_the_fastest_is_chosen_and_the_report_says_so(clock):
    fused = block()
    assert plans(fused) == [select.by_rule(SHAPE).plan] * 2
    assert select.by_rule(SHAPE).plan != "torch"
    rf.tune(fused, X)
    assert fused._cache.held() == (), "the next call packs anew"
    (row,) = rf.report(fused, X)
    assert (row.backend, row.reason) == ("torch", REASON)
    assert plans(fused) == ["torch"] * 2
    with torch.no_grad():
        assert torch.allclose(fused(X), fused.original()(X), atol=1e-5)


def test_rows(clock):
    net = rf.models.resnet18(10, 3, block=rf.reference.Residual).eval()
    x = torch.randn(3, 3, 32, 32)
    rows = rf.tune(rf.fuse(net), x)
    assert isinstance(rows, Tuning)
    assert len(rows) == 11
    assert sum(row.count for row in rows) == 20
    first = rows[0]
    assert first.shape == select.ConvShape(
        "cpu", torch.float32, 3, 64, (7, 7), (16, 16), stride=(2, 2), batch=3
    )
    assert first.ms["direct"] == 2.0
    assert first.ms["torch"] == 1.0
    assert set(first.ms) == {"direct", "stem", "torch"}
    assert (first.count, first.plan, first.by_rule) == (1, "torch", "stem")
    assert all(0 < error < 2e-6 for row in rows for error in row.errors.values())
    assert {row.plan for row in rows} == {"torch"}
    assert rows[1:3] == (rows[1], rows[2])
    assert next(reversed(rows)).shape.in_channels == 512


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_errors_are_beside_eager_of_any_torch(dtype, clock, monkeypatch):
    """torch 2.11's batch norm refuses an eps of 0; what eager computes has the bits of one."""
    batch_norm, seen = torch.nn.functional.batch_norm, []

    def refusing(x, mean, var, weight, bias, *, eps):
        assert eps > 0
        seen.append(batch_norm(x, mean, var, weight, bias, eps=eps))
        assert_same(seen[-1], torch.batch_norm(x, weight, bias, mean, var, False, 0.1, 0.0, False))
        return seen[-1]

    fused, x = block().to(dtype), X.to(dtype)
    monkeypatch.setattr(torch.nn.functional, "batch_norm", refusing)
    rf.tune(fused, x)
    assert seen


def test_prints_as_a_table(clock, tuning_file):
    text = str(rf.tune(block(), X))
    heading, _, row, last = text.splitlines()
    row_plans = select.candidates(SHAPE)
    assert heading.split() == [
        "convolution", "batch", "count", *row_plans, "fastest", "by", "rule"
    ]  # fmt: skip
    assert row.split()[-8:-1] == ["2", "2", "4", "5", "3", "1", "torch"]
    by_rule = TORCH_FIRST[select.by_rule(SHAPE).plan] * 2e3
    assert last == f"all convolutions: 2 ms, by rule {by_rule:g} ms; kept in {tuning_file}"


def test_everything_is_put_back(clock):
    fused = block().train()
    fused.bn1.eval()
    state = {key: value.clone() for key, value in fused.state_dict().items()}
    flags = [m.training for m in fused.modules()]
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    rf.tune(fused, X)
    assert [m.training for m in fused.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, state[key]) for key, value in fused.state_dict().items())
    assert not _fused.watchers


def test_everything_is_put_back_when_it_fails(clock, monkeypatch):
    fused = block().train()
    with pytest.raises(ValueError, match=r"^tune: fused must run on x, got "):
        rf.tune(fused, X[:, :3])
    assert all(m.training for m in fused.modules())
    assert not _fused.watchers

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(candidates, "interleave", stop)
    with pytest.raises(KeyboardInterrupt):
        rf.tune(fused, X)
    assert all(m.training for m in fused.modules())
    assert fused._cache.held() == ()
    assert tuned.answers() == {}


def test_the_answer_is_for_every_batch_and_for_its_map_only(clock):
    """Batches that take turns must not pack at every call."""
    fused = block()
    rf.tune(fused, X)
    with torch.no_grad():
        fused(X)
        packed = fused._cache.held()
        fused(X[:1])
        fused(torch.cat([X, X]))
        assert fused._cache.held() is packed
        fused(torch.randn(2, 16, 24, 24))
    want = select.by_rule(replace(SHAPE, out_size=(24, 24))).plan
    assert [unit.choice.plan for unit in fused._cache.held()] == [want] * 2


def test_the_last_tuning_counts(clock):
    rf.tune(block(), X)
    clock({**TORCH_FIRST, "direct": 1e-4})
    rf.tune(block(), X[:1])
    choice = select.choose(SHAPE)
    assert choice.plan == "direct"
    assert choice.reason.startswith("tuned on this machine at batch 1: direct 0.1 ms, torch 1 ms")


def test_other_models_follow_without_being_told(clock):
    other = block()
    assert plans(other) != ["torch"] * 2
    rf.tune(block(), X)
    assert plans(other) == ["torch"] * 2


@pytest.mark.parametrize("x", [(X,), [X], {"X": X}], ids=["tuple", "list", "dict"])
def test_examples_of_every_kind(clock, x):
    assert len(rf.tune(block(), x)) == 1


def test_one_image_without_batch(clock):
    (row,) = rf.tune(block(), X[0])
    assert row.shape.batch == 1


def test_a_convolution_that_comes_in_several_ways_is_measured_once(clock):
    """With other padding and activation, with and without residual: by its commonest call."""
    convs = [rf.FusedConvBN(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)) for _ in "ab"]
    net = nn.Sequential(*convs, block()).eval()
    (row,) = rf.tune(net, X)
    assert row.count == 4
    assert clock() == [select.candidates(SHAPE)]


def test_geometry_of_every_kind_is_rebuilt(clock, monkeypatch):
    """What is measured has the model's output size, whatever stride, padding and dilation."""
    seen = []
    run = candidates._run

    def record(call, o, plan, packed):
        y = run(call, o, plan, packed)
        seen.append((call.shape.out_size, tuple(y.shape[-2:])))
        return y

    monkeypatch.setattr(candidates, "_run", record)
    for keywords in (
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 7, "stride": 3, "padding": 3},
        {"kernel_size": (1, 5), "padding": (4, 0), "dilation": (1, 2)},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 2, "stride": 4},
        {"kernel_size": 3, "groups": 4, "bias": False},
        {"kernel_size": 2, "stride": 2, "padding": 1},
    ):
        for size in ((12, 12), (9, 13)):
            net = rf.FusedConvBN(nn.Conv2d(16, 32, **keywords), nn.BatchNorm2d(32)).eval()
            rf.tune(net, torch.randn(1, 16, *size))
    assert len(seen) > 28
    assert all(wanted == got for wanted, got in seen)


def test_autocast_is_measured_in_its_dtype(clock):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (row,) = rf.tune(block(), X)
    assert row.shape.dtype == torch.bfloat16
    reason = select.choose(replace(SHAPE, dtype=torch.bfloat16)).reason
    assert reason.startswith("tuned on this machine at batch 2: torch 1 ms, direct 2 ms")
    assert "tuned" not in select.choose(SHAPE).reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(clock, dtype):
    (row,) = rf.tune(block().to(dtype), X.to(dtype))
    assert set(row.ms) == set(select.candidates(row.shape))
    assert all(ms is not None for ms in row.ms.values()), "our kernels are as exact as eager"


def test_where_there_is_one_plan_nothing_is_measured(clock, tuning_file):
    tuning = rf.tune(block().double(), X.double())
    assert clock() == []
    assert (tuning[0].ms, tuning[0].plan, tuning.path) == ({}, "torch", None)
    assert str(tuning).endswith("only one plan can compute each convolution")
    assert not tuning_file.exists()


def test_an_empty_batch_is_not_measured(clock):
    assert len(rf.tune(block(), X[:0])) == 0


def test_modules_that_run_eager_are_not_measured(clock):
    fused = block()
    fused.conv1.register_forward_hook(lambda *args: None)
    tuning = rf.tune(fused, X)
    assert str(tuning) == "no convolution ran fused"


def test_bad_arguments():
    for arguments, error, sentence in (
        ((3, X), TypeError, "tune: fused must be a torch.nn.Module, got int"),
        ((block(), 3), TypeError, "tune: x must be a tensor, a tuple of .*, got int"),
        ((nn.ReLU(), X), ValueError, "tune: fused must have fused modules, got a ReLU without: .*"),
    ):
        with pytest.raises(error, match=f"^{sentence}$"):
            rf.tune(*arguments)
    for keywords, error, sentence in (
        ({"allow": "torch"}, TypeError, "allow must be a sequence of plans, got 'torch'"),
        ({"allow": 3}, TypeError, "allow must be a sequence of plans, got 3"),
        ({"allow": ["fast"]}, ValueError, 'allow must be "direct" or .* or "torch", got "fast"'),
        ({"seconds": "1"}, TypeError, "seconds must be a number, got str"),
        ({"seconds": -1}, ValueError, "seconds must be at least 0 and finite, got -1"),
        ({"seconds": float("nan")}, ValueError, "seconds must be at least 0 and finite, got nan"),
    ):
        with pytest.raises(error, match=f"^tune: {sentence}$"):
            rf.tune(block(), X, **keywords)


# ---- verification and judgement ------------------------------------------------------------------


def spoil(monkeypatch, plan, change):
    """change(y) is what the plan computes from now on."""
    run = candidates._run

    def spoiled(call, o, which, packed):
        y = run(call, o, which, packed)
        return change(y) if which == plan else y

    monkeypatch.setattr(candidates, "_run", spoiled)


def one_wrong_pixel(y):
    y[0, 3, 5, 7] += 4
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change",
    [lambda y: y * 1.5, lambda y: y.roll(1, 1), lambda y: y / 0, one_wrong_pixel],
    ids=["scaled", "rolled", "not finite", "one pixel"],
)
def test_a_wrong_plan_is_an_error_before_anything_is_timed(clock, monkeypatch, change, dtype):
    spoil(monkeypatch, "winograd4", change)
    expected = r"^tune: winograd4 on 3x3 16->16 to 12x12 \w+ cpu, batch 2: the error .* got "
    with pytest.raises(RuntimeError, match=expected) as wrong:
        rf.tune(block().to(dtype), X.to(dtype))
    assert wrong.value.candidate == "winograd4"
    assert clock() == []
    assert tuned.answers() == {}


def test_an_inexact_plan_is_no_candidate_unless_allowed(clock, monkeypatch):
    spoil(monkeypatch, "winograd4", lambda y: y + 4e-6 * y.square().mean().sqrt())
    clock({"winograd4": 1e-3, "direct": 2e-3, "winograd2": 3e-3, "torch": 4e-3})
    (row,) = rf.tune(block(), X)
    assert row.errors["winograd4"] > 2e-6
    assert (row.ms["winograd4"], row.plan) == (None, "direct")
    assert "inexact" in str(rf.tune(block(), X))
    assert select.choose(SHAPE).reason == (
        "tuned on this machine at batch 2: direct 2 ms, winograd2 3 ms, torch 4 ms, "
        "winograd4_raw 9 ms"
    )
    (row,) = rf.tune(block(), X, allow=["winograd4"])
    assert (row.ms["winograd4"], row.plan) == (1.0, "winograd4")
    assert select.choose(SHAPE).plan == "winograd4"


def samples(**rounds):
    return {plan: Samples(tuple(seconds)) for plan, seconds in rounds.items()}


@pytest.mark.parametrize(
    ("measured", "fastest"),
    [
        (samples(direct=[3] * 10, torch=[2] * 10), "torch"),
        (samples(direct=[2] * 10, torch=[3] * 10), "direct"),
        (samples(direct=[100] * 10, torch=[99] * 10), "direct"),  # 1%
        (samples(direct=[100] * 10, torch=[97] * 10), "torch"),
        (samples(direct=[10] * 10, torch=[5] * 8 + [11] * 2), "direct"),  # 8 rounds of 10
        (samples(direct=[10] * 10, torch=[5] * 9 + [11]), "torch"),
        (samples(direct=[3] * 5, torch=[2] * 5, winograd2=[1] * 5), "winograd2"),
        (samples(torch=[3] * 5, winograd2=[2] * 5), "winograd2"),  # the rule's was not exact enough
        ({}, "direct"),
    ],
)
def test_only_what_is_faster_beyond_chance_displaces_the_rule(measured, fastest):
    assert candidates._fastest(measured, "direct") == fastest


def test_weights_take_turns():
    """As many copies as the model has bytes of weights, each in its turn."""
    call = candidates.ConvCall(SHAPE, (1, 1), "relu", residual=False)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_run", lambda call, o, plan, packed: seen.append(packed))
        o = candidates._operands(call)
        one = rf.ops.pack_conv(o.weight, plan="direct")
        run = candidates._runner(call, o, "direct", 3 * one.nbytes - 1)
        for _ in range(7):
            run()
    assert len({packed.data_ptr() for packed in seen}) == 3
    assert all(a is b for a, b in zip(seen, seen[3:], strict=False))
    assert all(torch.equal(packed, one) for packed in seen)


@pytest.mark.parametrize("pool", [False, True])
def test_a_stem_is_measured_with_its_max_pool(monkeypatch, pool):
    """One plan computes both in one pass, which only their common time shows."""
    layers = [nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    stem = rf.fuse(nn.Sequential(*layers[: 4 if pool else 3]).eval())
    run, sizes = candidates._run, {}

    def watched(call, o, plan, packed):
        y = run(call, o, plan, packed)
        sizes.setdefault(plan, set()).add(tuple(y.shape))
        return y

    monkeypatch.setattr(candidates, "_run", watched)
    (row,) = rf.tune(stem, torch.randn(2, 3, 30, 26), seconds=0)
    size = (2, 8, 8, 7) if pool else (2, 8, 15, 13)
    assert sizes == {plan: {size} for plan in row.ms}
    assert all(error < 2e-6 for error in row.errors.values())


def test_the_clock_is_the_real_one():
    """Once without a made-up clock: every plan gets a time."""
    (row,) = rf.tune(block(), X, seconds=0)
    assert all(ms > 0 for ms in row.ms.values())
    assert tuple(row.ms) == select.candidates(SHAPE)


# ---- what the choice makes of it -----------------------------------------------------------------


def test_force_goes_before_what_was_measured():
    learn(ALL)
    assert select.choose(SHAPE).plan == "torch"
    for word in ("direct", "winograd2"):
        with select.forced(word):
            assert select.choose(SHAPE) == select.Choice(word, f"forced to {word}")
    with select.forced("ours"):
        choice = select.choose(SHAPE)
        assert choice.plan != "torch"
        assert "tuned" not in choice.reason


def test_exact_nonfinite_takes_the_fastest_that_it_may():
    learn(ALL | {"direct": 3.0, "winograd4": 1.0, "torch": 4.0})
    choice = select.choose(SHAPE, exact_nonfinite=True)
    assert choice == select.Choice(
        "direct", "tuned on this machine at batch 2: direct 3 ms, torch 4 ms"
    )
    fused = block()
    assert plans(fused) == ["winograd4"] * 2
    fused.exact_nonfinite = True
    assert plans(fused) == ["direct"] * 2


def test_the_winner_is_named_first_though_another_was_faster_by_chance():
    learn(ALL | {"torch": 1.99}, plan="winograd2")
    choice = select.choose(SHAPE)
    assert choice.plan == "winograd2"
    assert choice.reason.endswith(
        ": winograd2 2 ms, torch 1.99 ms, winograd4 3 ms, direct 4 ms, winograd4_raw 5 ms"
    )


def test_an_answer_that_lacks_a_candidate_does_not_count():
    learn({"direct": 2.0, "torch": 1.0})
    assert select.choose(SHAPE) == select.by_rule(SHAPE)
    assert select.choose(SHAPE, exact_nonfinite=True).plan == "torch"


def test_plans_that_do_not_exist_here_are_passed_over():
    learn(ALL | {"of_the_future": 0.5}, plan="of_the_future")
    assert select.choose(SHAPE).plan == "torch"
    learn({"of_the_future": 0.5}, plan="of_the_future")
    assert select.choose(SHAPE) == select.by_rule(SHAPE)


def test_opt_in_plans_come_back_with_their_answer():
    learn(ALL)
    assert select.choose(SHAPE).plan == "torch", "it need not have been measured"
    learn(ALL | {"winograd5": 0.5})
    assert select.choose(SHAPE).plan == "winograd5"
    learn(ALL | {"winograd5": None})
    assert select.choose(SHAPE).plan == "torch"


def test_without_the_extension_no_answer_helps(monkeypatch):
    learn(ALL, plan="direct")
    monkeypatch.setattr(_extension, "extension_error", "it was not built")
    assert select.choose(SHAPE).plan == "torch"
    assert "it was not built" in select.choose(SHAPE).reason


@pytest.mark.parametrize(
    "part", ["threads", "isa", "cpu", "torch", "package", "kernels", "convolution"]
)
def test_an_answer_is_for_one_machine(part, monkeypatch, threads):
    threads(2)
    learn(ALL)
    assert select.choose(SHAPE).plan == "torch"
    shape = SHAPE
    if part == "threads":
        threads(1)
    elif part == "isa":
        monkeypatch.setattr(_extension, "cpu_isa", lambda: "another")
    elif part == "cpu":
        monkeypatch.setattr(tuned, "_cpu", ["another"])
    elif part == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99")
    elif part == "package":
        monkeypatch.setattr(tuned, "__version__", "9.9")
    elif part == "kernels":
        monkeypatch.setattr(_extension, "kernels_id", lambda: "00000000")
    else:
        shape = replace(SHAPE, groups=2)
    assert "tuned" not in select.choose(shape).reason


def test_modules_follow_the_number_of_threads(threads):
    threads(2)
    learn(ALL)
    fused = block()
    want = [select.by_rule(SHAPE).plan] * 2
    for _ in range(2):
        threads(2)
        assert plans(fused) == ["torch"] * 2
        threads(1)
        assert plans(fused) == want


def test_same_file_same_bits():
    """Promise 12, with another answer learned and unlearned in between."""
    learn(ALL)
    fused = block()
    with torch.no_grad():
        before = fused(X)
        learn(ALL, plan="winograd4")
        fused(X)
        learn(ALL)
        assert_same(fused(X), before)
        assert_same(block()(X), before)


# ---- the file ------------------------------------------------------------------------------------


def test_the_next_process_knows(clock, tuning_file):
    tuning = rf.tune(block(), X)
    assert tuning.path == tuning_file
    code = (
        "import torch, resnet_fused as rf\n"
        "fused = rf.FusedResidual(16, 16).eval()\n"
        "print(rf.report(fused, torch.randn(2, 16, 12, 12))[0].reason)\n"
    )
    for name, want in ((str(tuning_file), True), ("none", False)):
        environ = os.environ | {"RESNET_FUSED_TUNE_FILE": name, "RESNET_FUSED_FORCE": ""}
        code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n{code}"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
        )
        assert (done.stdout.strip() == REASON) == want, done.stdout + done.stderr


def test_what_others_measured_meanwhile_is_kept_and_used(clock, tuning_file):
    other = replace(SHAPE, out_channels=32)
    _tuning_file.merge(tuning_file, tuned.machine(), {str(other): Answer(1, "torch", ALL)})
    assert "tuned" not in select.choose(other).reason
    rf.tune(block(), X)
    assert select.choose(other).plan == "torch"
    assert set(_tuning_file.read(tuning_file).machines[tuned.machine()]) == {KEY, str(other)}


def test_no_file_is_wanted(clock, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FUSED_TUNE_FILE", "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning = rf.tune(block(), X)
    assert tuning.path is None
    assert str(tuning).endswith("; kept in this process only")
    assert select.choose(SHAPE).reason == REASON
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_warning(clock, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RESNET_FUSED_TUNE_FILE", str(tmp_path / "file" / "tuning.json"))
    with pytest.warns(RuntimeWarning) as caught:
        tuning = rf.tune(block(), X)
    (warning,) = caught
    assert str(warning.message).startswith(
        "resnet_fused: what was measured holds in this process only, because "
    )
    assert str(warning.message).endswith(("Not a directory", "File exists"))
    assert warning.filename == __file__
    assert tuning.path is None
    assert select.choose(SHAPE).reason == REASON


def test_a_damaged_file_is_one_warning_and_then_replaced(clock, tuning_file):
    tuning_file.parent.mkdir()
    tuning_file.write_text('{"format": "resnet-fused tuning", "vers')
    with pytest.warns(RuntimeWarning) as caught:
        tuned.load()
    (warning,) = caught
    expected = "is damaged: it is not JSON, so it counts as absent"
    assert str(warning.message) == f"resnet_fused: the tuning file {tuning_file} {expected}"
    assert "tuned" not in select.choose(SHAPE).reason
    rf.tune(block(), X)
    tuned.load()
    assert select.choose(SHAPE).reason == REASON


def test_a_damaged_file_does_not_stop_the_import(tuning_file):
    tuning_file.parent.mkdir()
    tuning_file.write_bytes(b"\x80\x04\x95")
    code = "import resnet_fused as rf, torch; rf.FusedResidual(4, 4)(torch.ones(1, 4, 4, 4))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stderr.count("RuntimeWarning") == 1
    assert "counts as absent" in done.stderr


# ---- graphs --------------------------------------------------------------------------------------


def captured(graphs):
    """A backend of torch.compile that keeps the plans of each graph in `graphs`."""

    def backend(graph, example_inputs):
        kernels = [n.kwargs["plan"] for n in graph.graph.nodes if "plan" in n.kwargs]
        graphs.append(set(kernels))
        return graph.forward

    return backend


def test_compiled_graphs_take_what_was_measured(threads):
    threads(2)
    torch._dynamo.reset()
    rule = {select.by_rule(SHAPE).plan}
    fused, graphs = block(), []
    compiled = torch.compile(fused, fullgraph=True, backend=captured(graphs))
    with torch.inference_mode():
        want = fused(X)
        assert_same(compiled(X), want)
        learn(ALL)
        compiled(X)
        compiled(X)
        learn(ALL, plan="winograd2")
        assert_same(compiled(X), fused(X))
        threads(1)
        compiled(X)
    assert graphs == [rule, {"torch"}, {"winograd2"}, rule]


def test_a_graph_for_every_size_goes_by_the_rule():
    torch._dynamo.reset()
    learn(ALL)
    fused, graphs = block(), []
    compiled = torch.compile(fused, fullgraph=True, backend=captured(graphs))
    with torch.inference_mode():
        for size in ((12, 12), (13, 20)):
            x = torch.randn(2, 16, *size)
            torch._dynamo.mark_dynamic(x, 2)
            torch._dynamo.mark_dynamic(x, 3)
            assert torch.allclose(compiled(x), fused(x), atol=1e-5)
    assert graphs == [{select.by_rule(SHAPE).plan}]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_graphs_take_what_was_measured(strict):
    learn(ALL, plan="winograd2")
    fused = block()
    with torch.no_grad():
        program = torch.export.export(fused, (X,), strict=strict)
        found = {n.kwargs["plan"] for n in program.graph.nodes if "plan" in n.kwargs}
        assert found == {"winograd2"}
        assert_same(program.module()(X), fused(X))
