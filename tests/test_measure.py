"""Timing, verification and comparison: what the commands' numbers rest on."""

import contextlib
import math

import pytest
import torch
from torch import nn

from resnet_fused._errors import kind_and_line, one_line
from resnet_fused.measure import compare as compare_module
from resnet_fused.measure import engines as engines_module
from resnet_fused.measure import timing
from resnet_fused.measure.compare import Result, WrongResult, best_peer, compare, ratio
from resnet_fused.measure.engines import (
    CHANNELS_LAST,
    COMPILE,
    EAGER,
    FUSED,
    Unavailable,
    engines,
    prepare,
)
from resnet_fused.measure.error import (
    error_limit,
    exact_logits,
    largest_difference,
    relative_error,
)
from resnet_fused.measure.networks import plain_net, random_images
from resnet_fused.measure.timing import Runner, Samples, interleave


class Clock:
    """A clock that only runners move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def runner(self, seconds, log=None, name=None, context=contextlib.nullcontext):
        def call():
            self.now += seconds
            if log is not None:
                log.append(name)

        return Runner(call, context)


def test_samples_quartiles():
    samples = Samples((5.0, 1.0, 3.0, 2.0, 4.0))
    assert samples.median == 3.0
    assert samples.quartiles == (2.0, 4.0)
    assert Samples((7.0,)).quartiles == (7.0, 7.0)


def test_interleave_measures_each_runner(monkeypatch):
    clock = Clock(monkeypatch)
    result = interleave({"slow": clock.runner(0.1), "fast": clock.runner(0.001)}, rounds=7)
    assert {name: len(s.seconds) for name, s in result.items()} == {"slow": 7, "fast": 7}
    assert result["slow"].median == pytest.approx(0.1)
    assert result["fast"].median == pytest.approx(0.001)


def test_interleave_takes_turns(monkeypatch):
    clock, log, done = Clock(monkeypatch), [], []
    runners = {name: clock.runner(1.0, log, name) for name in "abc"}
    interleave(runners, rounds=30, on_round=lambda *count: done.append(count))
    rounds = ["".join(log[-3 * i :][:3]) for i in range(30, 0, -1)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}, "one sample each a round"
    assert len(set(rounds)) == 6, "in every order"
    assert done == [(i + 1, 30) for i in range(30)]


def test_interleave_keeps_to_its_budget(monkeypatch):
    clock = Clock(monkeypatch)
    runners = {"a": clock.runner(0.25), "b": clock.runner(0.75)}
    start = clock.now
    result = interleave(runners, budget_s=20, warmup_s=0)
    assert len(result["a"].seconds) == 20
    assert clock.now - start == pytest.approx(20 + 2 * (0.25 + 0.75))
    assert len(interleave(runners, budget_s=0, warmup_s=0)["a"].seconds) == timing.MIN_ROUNDS
    assert len(interleave(runners, budget_s=1e9, warmup_s=0)["a"].seconds) == timing.MAX_ROUNDS
    assert interleave({}, budget_s=1) == {}


def test_interleave_rests_before_each_sample(monkeypatch):
    clock, log = Clock(monkeypatch), []

    def sleep(seconds):
        clock.now += seconds
        log.append(seconds)

    monkeypatch.setattr(timing.time, "sleep", sleep)
    runners = {name: clock.runner(0.5, log, name) for name in "ab"}
    result = interleave(runners, budget_s=16, warmup_s=0, rest_s=1.5)
    assert [s.median for s in result.values()] == [0.5, 0.5], "rests are not timed"
    timed = log[4:]
    assert len(timed) == 2 * 2 * 5, "16 s are enough for 4 rounds, 5 is the least"
    assert timed[::2] == [1.5] * 10
    log.clear()
    interleave(runners, budget_s=40, warmup_s=0, rest_s=1.5)
    assert log.count(1.5) == 2 * 10
    log.clear()
    interleave(runners, rounds=3)
    assert set(log) == {"a", "b"}


def test_interleave_repeats_short_calls(monkeypatch):
    clock, log = Clock(monkeypatch), []
    runners = {"a": clock.runner(0.03, log, "a"), "b": clock.runner(0.2, log, "b")}
    interleave(runners, rounds=1, warmup_s=0, min_sample_s=0.1)
    warm_up, untimed = 2, 1
    assert log.count("a") == warm_up + untimed + 4
    assert log.count("b") == warm_up + 1


def test_context_is_entered_around_samples_and_not_timed(monkeypatch):
    clock, inside = Clock(monkeypatch), []

    @contextlib.contextmanager
    def context():
        clock.now += 100
        inside.append(True)
        yield
        inside.pop()
        clock.now += 100

    runner = clock.runner(1.0, context=context)
    call = runner.call
    runner = Runner(lambda: (call(), inside[0]), context)
    assert interleave({"a": runner}, rounds=3)["a"].median == pytest.approx(1.0)
    assert not inside


def test_errors():
    exact = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert relative_error(torch.tensor([[3.0, 4.5]]), exact) == pytest.approx(0.1)
    assert largest_difference(torch.tensor([[3.0, 4.5]]), exact) == pytest.approx(0.5)
    assert relative_error(torch.tensor([[3.0, math.nan]]), exact) == math.inf
    assert relative_error(torch.tensor([3.0, 4.0]), exact) == math.inf, "another shape"
    assert error_limit(1e-7, torch.float32) == 2e-6
    assert error_limit(2e-6, torch.float32) == 4e-6
    assert error_limit(1e-2, torch.bfloat16) == 2e-2
    assert error_limit(1e-3, torch.bfloat16) == 4e-3


def test_exact_logits_leave_the_net_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    x = torch.randn(19, 3, 2, 2)
    exact = exact_logits(net, x)
    assert exact.shape == (19, 3)
    assert exact.dtype == torch.float64
    assert net[1].weight.dtype == torch.float32
    torch.testing.assert_close(exact.float(), net(x), rtol=1e-5, atol=1e-6)


def test_plain_net_is_reproducible_and_leaves_the_global_seed_alone():
    before = torch.random.get_rng_state()
    a, b, c = plain_net("resnet18"), plain_net("resnet18"), plain_net("resnet18", seed=1)
    random_images(1, size=32)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(a[0][1].running_var, b[0][1].running_var)
    assert not torch.equal(a[0][1].running_var, c[0][1].running_var)
    assert float(a[0][1].running_mean.abs().max()) > 0
    assert not a.training


def result(engine, *seconds, batch=2):
    return Result(engine, batch, Samples(seconds) if seconds else None, 1e-7)


def test_best_peer_and_ratio():
    group = [result(EAGER, 4.0), result(CHANNELS_LAST, 2.0), result(COMPILE), result(FUSED, 1.0)]
    assert best_peer(group).engine == CHANNELS_LAST
    assert ratio(group[3], best_peer(group)) == 2.0
    assert ratio(group[2], best_peer(group)) is None
    assert best_peer(group[2:]) is None
    assert ratio(group[3], None) is None


def test_record():
    record = result(FUSED, 1.0, 2.0, 3.0, 4.0, 5.0).record()
    assert record["median_ms"] == 3000
    assert (record["q1_ms"], record["q3_ms"], record["rounds"]) == (2000, 4000, 5)
    assert record["images_per_second"] == pytest.approx(2 / 3)
    record = Result(COMPILE, 1, reason="no compiler").record()
    assert record["reason"] == "no compiler"
    assert "median_ms" not in record


def test_engine_choice():
    assert list(engines()) == [EAGER, CHANNELS_LAST, COMPILE, FUSED]
    assert COMPILE not in engines(compile=False)
    assert len(engines(ours=True)) == 5


def failing(model, x):
    raise RuntimeError("\n  no such luck\nsecond line")


def test_peer_that_fails_is_unavailable_and_ours_is_not():
    with pytest.raises(Unavailable, match=r"^no such luck$"):
        prepare(COMPILE, failing, None, None)
    with pytest.raises(RuntimeError):
        prepare(FUSED, failing, None, None)


def test_exceptions_in_one_line():
    assert one_line(ValueError()) == kind_and_line(ValueError("\n")) == "ValueError"
    assert kind_and_line(ValueError("\n wrong\nmore")) == "ValueError: wrong"
    assert len(one_line(ValueError("x" * 500))) == 100
    assert one_line(ValueError("x" * 500), None) == "x" * 500


def shifted(model, x):
    return Runner(lambda: model(x) + 1e-3, torch.inference_mode)


@pytest.fixture
def small():
    net = plain_net("resnet18", num_classes=5)
    x = random_images(2, size=32)
    return net, x, exact_logits(net, x)


def test_compare_verifies_before_it_times(small, monkeypatch):
    net, x, exact = small
    timed = []
    monkeypatch.setattr(compare_module, "interleave", lambda runners, **_: timed.append(runners))
    wrong = {EAGER: engines_module._eager, FUSED: shifted}
    with pytest.raises(WrongResult, match=r"^fused: relative error .* at most 2e-06, got \d"):
        compare(net, x, exact, wrong)
    assert not timed


def test_compare_reports_what_could_not_run(small):
    net, x, exact = small
    table = {EAGER: engines_module._eager, COMPILE: failing}
    eager, compiled = compare(net, x, exact, table, rounds=2, warmup_s=0)
    assert len(eager.samples.seconds) == 2
    assert 0 < eager.error < 2e-6
    assert (compiled.samples, compiled.reason) == (None, "no such luck")


def test_engines_change_no_global_state(small):
    """The engines' settings (inference mode, own kernels) end with each call."""
    net, x, exact = small
    before = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_num_threads()
    weight = net[0][0].weight
    layout = weight.stride()
    compare(net, x, exact, engines(compile=False, ours=True), rounds=1, warmup_s=0)
    assert before == (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
    )
    assert net[0][0].weight is weight
    assert weight.stride() == layout


def test_compile_leaves_its_settings(small):
    """Freezing is for this engine only."""
    import torch._inductor.config

    net, x, exact = small
    before = torch._inductor.config.freezing
    try:
        _, y = prepare(COMPILE, engines()[COMPILE], net, x)
    except Unavailable as why:
        pytest.skip(f"torch.compile does not work here: {why}")
    assert torch._inductor.config.freezing is before
    assert relative_error(y, exact) < 1e-5
