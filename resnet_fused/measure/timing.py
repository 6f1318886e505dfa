"""Interleaved timing: in every round every runner has its turn, so noise hits all alike.

Shared machines drift by tens of percent within minutes; medians over interleaved rounds keep the
ratios.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

MIN_SAMPLE_S = 0.04  # shorter calls are repeated within one sample, after one untimed call
WARMUP_S = 0.3
MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True)
class Runner:
    """Something to time: `call()` is one run, `context()` is entered around it, off the clock."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager] = nullcontext

    def run(self) -> object:
        """One run in its context."""
        with self.context():
            return self.call()


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, seconds per call."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        q1, _, q3 = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return q1, q3


def interleave(
    runners: Mapping[str, Runner],
    *,
    budget_s: float = 10.0,
    rounds: int | None = None,
    warmup_s: float = WARMUP_S,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Samples]:
    """Times the runners in turn, one sample each a round, each round in an order of its own.

    budget_s: seconds for the timed rounds together, from which their number follows (5 to 200).
    rounds: fixes their number instead. on_round(done, total) is called after each.
    """
    repeats, costs = {}, {}
    for name, runner in runners.items():
        once = _warm_up(runner, warmup_s)
        repeats[name] = max(1, math.ceil(MIN_SAMPLE_S / once))
        costs[name] = once * (repeats[name] + (repeats[name] > 1))
    if rounds is None:
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget_s / max(sum(costs.values()), 1e-9))))
    names, order = list(runners), random.Random(0)  # no runner always follows the same other one
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        for name in order.sample(names, len(names)):
            seconds[name].append(_sample(runners[name], repeats[name]))
        on_round(done + 1, rounds)
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def _warm_up(runner: Runner, warmup_s: float) -> float:
    """Runs for `warmup_s`, at least twice; returns the seconds of the fastest call."""
    best, start = math.inf, time.perf_counter()
    calls = 0
    with runner.context():
        while calls < 2 or time.perf_counter() - start < warmup_s:
            before = time.perf_counter()
            runner.call()
            best = min(best, time.perf_counter() - before)
            calls += 1
    return max(best, 1e-9)


def _sample(runner: Runner, repeats: int) -> float:
    with runner.context():
        if repeats > 1:
            runner.call()  # brings the weights back into cache: the others ran meanwhile
        start = time.perf_counter()
        for _ in range(repeats):
            runner.call()
        return (time.perf_counter() - start) / repeats
