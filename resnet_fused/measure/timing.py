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
from typing import Protocol

MIN_SAMPLE_S = 0.04  # shorter calls are repeated within a sample, after one untimed call
WARMUP_S = 0.3
MIN_ROUNDS, MAX_ROUNDS = 5, 200


class Timed(Protocol):
    """Something to time, here or in another process."""

    def time(self, calls: int) -> float:
        """Seconds per call of that many calls in a row."""


@dataclass(frozen=True)
class Runner:
    """Timed here: `call()` is one run, `context()` is entered around it, off the clock."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager] = nullcontext

    def run(self) -> object:
        """One run in its context."""
        with self.context():
            return self.call()

    def time(self, calls: int) -> float:
        with self.context():
            start = time.perf_counter()
            for _ in range(calls):
                self.call()
            return (time.perf_counter() - start) / calls


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
    runners: Mapping[str, Timed],
    *,
    budget_s: float = 10.0,
    rounds: int | None = None,
    warmup_s: float = WARMUP_S,
    rest_s: float = 0.0,
    min_sample_s: float = MIN_SAMPLE_S,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Samples]:
    """Times the runners in turn, one sample each a round, each round in an order of its own.

    budget_s: seconds for the timed rounds together, from which their number follows (5 to 200).
    rounds: fixes their number instead. rest_s: pause before each sample, in which the threads of
    the sample before stop spinning. min_sample_s: a sample repeats calls that are shorter.
    on_round(done, total) is called after each round.
    """
    repeats, costs = {}, {}
    for name, runner in runners.items():
        once = _warm_up(runner, warmup_s)
        repeats[name] = max(1, math.ceil(min_sample_s / once))
        costs[name] = once * (repeats[name] + (repeats[name] > 1)) + rest_s
    if rounds is None:
        rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget_s / max(sum(costs.values()), 1e-9))))
    names, order = list(runners), random.Random(0)  # no runner always follows the same other one
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        for name in order.sample(names, len(names)):
            if rest_s:
                time.sleep(rest_s)
            seconds[name].append(_sample(runners[name], repeats[name]))
        on_round(done + 1, rounds)
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def _warm_up(runner: Timed, warmup_s: float) -> float:
    """Runs for `warmup_s`, at least twice; returns the seconds of the fastest call."""
    best, start, calls = math.inf, time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - start < warmup_s:
        best = min(best, runner.time(1))
        calls += 1
    return max(best, 1e-9)


def _sample(runner: Timed, repeats: int) -> float:
    if repeats > 1:
        runner.time(1)  # brings the weights back into cache: the others ran meanwhile
    return runner.time(repeats)
