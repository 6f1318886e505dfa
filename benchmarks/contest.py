"""One case: every entrant loaded in its own process, its logits against float64, all interleaved.

Before each sample everybody rests. After a run the threads of PyTorch and ncnn (OpenMP) spin for
some 10 ms, those of OpenVINO and MNN for less; ONNX Runtime's would for 45. Without a rest ncnn
took 18.7 ms (ResNet-18, two cores), with 0.1 s 15.4, about what it takes alone; with 0.3 s all but
one became slower again, after longer sleep. So rests are short, and samples long beside waking up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from torch import Tensor

from .cases import Case
from .common import (
    FUSED,
    Result,
    Unavailable,
    exact_logits,
    interleave,
    plain_net,
    random_images,
    relative_error,
    with_samples,
)
from .peers import Entrant, Job
from .remote import Worker

REST_S = 0.05
SAMPLE_S = 0.1
OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Setup:
    """How all cases of one run are measured."""

    entrants: Sequence[Entrant]
    threads: int
    size: int = 224
    seconds: float = 20.0
    rounds: int | None = None
    rest_s: float = REST_S


@dataclass
class Contest:
    """Measures cases; files that serve several of them (images, converted nets) are in `folder`."""

    setup: Setup
    folder: Path
    largest_batch: int
    _exact: dict[str, Tensor] = field(default_factory=dict)
    _converted: dict[tuple[str, str], str] = field(default_factory=dict)  # "" or why not

    def __post_init__(self) -> None:
        self._images = random_images(self.largest_batch, size=self.setup.size)
        numpy.save(self.folder / "images.npy", self._images.numpy())

    def measure(self, case: Case, on_stage: OnStage) -> tuple[list[Result], dict[str, str]]:
        """One result an entrant, in their order, and the settings of those that could run.

        Errors are relative L2 of the logits against the float32 net in float64, so that in bfloat16
        everybody's own rounding of weights and images counts.
        """
        results: dict[str, Result] = {}
        settings: dict[str, str] = {}
        runners: dict[str, Worker] = {}
        on_stage("float64, to compare with", 0, 0)
        exact = self._exact_logits(case)
        with contextlib.ExitStack() as stack:
            for i, entrant in enumerate(self.setup.entrants):
                on_stage(f"preparing {entrant.title}", i, len(self.setup.entrants))
                try:
                    worker, logits, how = self._prepare(entrant, case, stack)
                except Unavailable as why:
                    if entrant.title == FUSED:
                        raise
                    results[entrant.title] = Result(entrant.title, case.batch, reason=str(why))
                    continue
                error = relative_error(logits, exact)
                results[entrant.title] = Result(entrant.title, case.batch, error=error)
                settings[entrant.title] = how
                runners[entrant.title] = worker
            return self._time(case, runners, results, on_stage), settings

    def _time(
        self,
        case: Case,
        runners: dict[str, Worker],
        results: dict[str, Result],
        on_stage: OnStage,
    ) -> list[Result]:
        while True:
            try:
                samples = interleave(
                    runners,
                    budget_s=self.setup.seconds,
                    rounds=self.setup.rounds,
                    rest_s=self.setup.rest_s,
                    min_sample_s=SAMPLE_S,
                    on_round=lambda done, total: on_stage("timing, interleaved", done, total),
                )
                break
            except Unavailable:  # someone died; again without
                name = next(name for name, worker in runners.items() if worker.failed)
                if name == FUSED:
                    raise
                reason = runners.pop(name).failed
                results[name] = Result(name, case.batch, reason=reason)
        return with_samples(results, samples)

    def _prepare(
        self, entrant: Entrant, case: Case, stack: contextlib.ExitStack
    ) -> tuple[Worker, Tensor, str]:
        """A loaded worker that `stack` will end, its logits and its settings."""
        setup = self.setup
        if case.dtype not in entrant.dtypes:
            raise Unavailable(f"computes no {case.dtype} on a CPU")
        if missing := entrant.missing():
            raise Unavailable(
                f"needs {', '.join(missing)}, not installed: pip install -e '.[bench]'"
            )
        what = case.model, case.dtype, case.batch, setup.size, setup.threads
        job = Job(entrant.key, *what, self.folder)
        self._convert(entrant, job)
        log = self.folder / f"{entrant.key}-{case}.log"
        worker = stack.enter_context(Worker(entrant, setup.threads, log))
        return worker, *worker.load(job)

    def _convert(self, entrant: Entrant, job: Job) -> None:
        """Once for each net; a failure is remembered too."""
        key = entrant.key, job.model
        if entrant.converts and key not in self._converted:
            log = self.folder / f"{entrant.key}-{job.model}-convert.log"
            try:
                with Worker(entrant, self.setup.threads, log) as worker:
                    worker.convert(job)
            except Unavailable as why:
                self._converted[key] = f"conversion: {why}"
            else:
                self._converted[key] = ""
        if why := self._converted.get(key):
            raise Unavailable(why)

    def _exact_logits(self, case: Case) -> Tensor:
        if case.model not in self._exact:
            self._exact[case.model] = exact_logits(plain_net(case.model), self._images)
        return self._exact[case.model][: case.batch]
