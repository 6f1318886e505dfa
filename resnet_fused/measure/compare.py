"""Runs one net through several engines: verifies each against fp64, then times them interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .engines import EAGER, OWN, Engine, Prepared, Unavailable, prepare
from .error import error_limit, relative_error
from .timing import WARMUP_S, Samples, interleave

OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result:
    """One engine on one net and batch. Without samples, `reason` says why."""

    engine: str
    batch: int
    samples: Samples | None = None
    error: float | None = None  # relative L2 of the logits against fp64
    reason: str = ""

    @property
    def images_per_second(self) -> float:
        return self.batch / self.samples.median

    def record(self) -> dict[str, object]:
        """For JSON; times in milliseconds per call."""
        entry = {
            "engine": self.engine,
            "batch": self.batch,
            "error": self.error,
            "reason": self.reason,
        }
        if self.samples:
            q1, q3 = self.samples.quartiles
            entry |= {
                "median_ms": 1e3 * self.samples.median,
                "q1_ms": 1e3 * q1,
                "q3_ms": 1e3 * q3,
                "rounds": len(self.samples.seconds),
                "images_per_second": self.images_per_second,
            }
        return entry


class WrongResult(Exception):
    """A fused net's logits are further from fp64 than allowed; nothing was timed."""


def compare(
    model: nn.Module,
    x: Tensor,
    exact: Tensor,
    engines: Mapping[str, Engine],
    *,
    budget_s: float = 10.0,
    rounds: int | None = None,
    warmup_s: float = WARMUP_S,
    on_stage: OnStage = lambda text, done, total: None,
) -> list[Result]:
    """Results in the order of `engines`.

    model: a plain net in eval mode; x: (N, C, H, W) in its dtype; exact: fp64 logits (N, classes).
    budget_s, rounds, warmup_s: as in `interleave`. on_stage(text, done, total) reports progress.
    """
    runners, results = verified(model, x, exact, engines, on_stage=on_stage)
    samples = interleave(
        runners,
        budget_s=budget_s,
        rounds=rounds,
        warmup_s=warmup_s,
        on_round=lambda done, total: on_stage("timing, interleaved", done, total),
    )
    return with_samples(results, samples)


def verified(
    model: nn.Module,
    x: Tensor,
    exact: Tensor,
    engines: Mapping[str, Engine],
    *,
    standard: str = EAGER,
    on_stage: OnStage = lambda text, done, total: None,
) -> tuple[dict[str, Prepared], dict[str, Result]]:
    """What can be timed, by engine, and a result for each engine: its error, or why it cannot run.

    standard: the engine whose error limits ours. Raises WrongResult.
    """
    runners, results = {}, {}
    for i, (name, engine) in enumerate(engines.items()):
        on_stage(f"preparing {name}", i, len(engines))
        try:
            runners[name], y = prepare(name, engine, model, x)
        except Unavailable as why:
            results[name] = Result(name, len(x), reason=str(why))
        else:
            results[name] = Result(name, len(x), error=relative_error(y, exact))
    _verify(results, x.dtype, standard)
    return runners, results


def with_samples(results: Mapping[str, Result], samples: Mapping[str, Samples]) -> list[Result]:
    """The results, those that were timed with what was measured."""
    return [
        Result(name, r.batch, samples[name], r.error) if name in samples else r
        for name, r in results.items()
    ]


def best_peer(results: list[Result]) -> Result | None:
    """The fastest result that is not ours."""
    peers = [r for r in results if r.engine not in OWN and r.samples]
    return min(peers, key=lambda r: r.samples.median, default=None)


def of_engine(results: list[Result], engine: str) -> Result | None:
    """That engine's result if it has been timed."""
    return next((r for r in results if r.engine == engine and r.samples), None)


def ratio(result: Result, standard: Result | None) -> float | None:
    """How many times as fast as `standard`."""
    if standard is None or result.samples is None:
        return None
    return standard.samples.median / result.samples.median


def _verify(results: Mapping[str, Result], dtype: torch.dtype, standard: str) -> None:
    eager = results.get(standard)
    if eager is None or eager.error is None:
        return  # nothing of the same precision to hold ours against
    limit = error_limit(eager.error, dtype)
    for name in OWN:
        error = results[name].error if name in results else None
        if error is not None and not error <= limit:
            raise WrongResult(
                f"{name}: relative error of the logits against fp64 must be at most {limit:.2g}, "
                f"got {error:.2g}"
            )
