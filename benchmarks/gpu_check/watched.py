"""A pytest plugin that keeps what each test on a GPU has shown, whatever a kernel does to it:

    pytest -p benchmarks.gpu_check.watched --watched FOLDER --numprocesses 16 --maxschedchunk 1

A test that hangs ends its process after --watched-seconds, a fault after which CUDA is of no more
use ends it at once: pytest-xdist starts another one for the tests behind it. Each result is a line
of FOLDER/tests.jsonl as soon as it is known. Which test a process runs is in a file of its own
there, together with the last words of a process that ended in the middle. Slow tests come behind
others, and last those of kernels that hung or faulted in the stage `smoke`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from . import faults, smoke

LOG, LAST_WORDS = "tests.jsonl", ".last"
SECONDS = 60.0
SLOW = 2  # times as long for tests marked `slow`: Triton or Inductor compile a lot for them
# From harmless to worst: a test counts as the worst that was seen of it.
OUTCOMES = ("passed", "skipped", "unfinished", "failed", "error", "crashed", "hung")
BAD = OUTCOMES[2:]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu-check")
    group.addoption("--watched", metavar="FOLDER", help="Keep each result there at once.")
    group.addoption("--watched-seconds", type=float, default=SECONDS, help="A test's limit.")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("watched")
    if folder is None:
        return
    in_worker = hasattr(config, "workerinput")
    limit = config.getoption("watched_seconds")
    config.pluginmanager.register(Watch(Path(folder), limit, in_worker))
    if not in_worker:
        config.pluginmanager.register(Log(Path(folder)))


class Watch:
    """In each process that runs tests: ends it where it must not go on."""

    def __init__(self, folder: Path, limit_s: float, in_worker: bool) -> None:
        self.file = (folder / f"{os.getpid()}{LAST_WORDS}").open("w")
        self.folder, self.limit_s, self.in_worker = folder, limit_s, in_worker
        self.session: pytest.Session | None = None
        self.test = ""

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session
        faulthandler.enable(self.file)  # for a segmentation fault

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """What may cost much time comes last, so that all others are run."""
        words = smoke.suspects(self.folder)
        items.sort(key=lambda item: _turn(item, words))

    def pytest_sessionfinish(self) -> None:
        faults.cancel()

    # Each part of a test has the limit for itself: pytest lifts it where one fails.

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.test = item.nodeid
        self._say(f"{self.test}\n")
        self._limit(item)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self._limit(item)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        self._limit(item)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if not self.test:  # of another process
            return
        why = faults.broken()
        faults.cancel()
        if not why:
            self._say("")
        elif self.in_worker:
            self._say(f"{self.test}\n{why}\n")
            os._exit(1)
        else:
            self._say(f"{self.test}\n{why}\n")
            self.session.shouldstop = f"{self.test} has broken this process: {why}"
        self.test = ""

    def _limit(self, item: pytest.Item) -> None:
        slow = item.get_closest_marker("slow") is not None
        faults.end_in(self.limit_s * (SLOW if slow else 1), self.file)

    def _say(self, text: str) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.file.write(text)
        self.file.flush()


def _turn(item: pytest.Item, suspects: Iterable[str]) -> tuple[bool, bool, bool, int]:
    """Tests with the least come first: Triton's behind others, shuffled, so that those that need
    the same kernels are apart, and the second finds them compiled."""
    name = item.nodeid.partition("::")[2]
    slow, compiles = item.get_closest_marker("slow") is not None, "triton" in name
    suspected = any(word in name for word in suspects)
    return suspected, slow, compiles, zlib.crc32(name.encode()) if compiles else 0


class Log:
    """In the process that hears of all results."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / LOG).open("w")

    def _add(self, **line: object) -> None:
        print(json.dumps(line), file=self.file, flush=True)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # else pytest-xdist's workers collect
            self._add(collected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._add(collected=len(ids))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._add(test=report.nodeid, outcome="error", why=_reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._add(test=nodeid, outcome="unfinished")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when not in ("setup", "call", "teardown"):  # pytest-xdist: the worker is gone
            outcome = "crashed"
        elif report.when != "call" and report.failed:
            outcome = "error"
        elif report.when == "call" or report.skipped:
            outcome = report.outcome
        else:
            return
        why = "" if outcome == "passed" else _reason(report)
        self._add(test=report.nodeid, outcome=outcome, why=why)


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines()
    return (lines[0 if crash else -1] if lines else "")[:300]


@dataclass
class Results:
    """outcomes and why: by test. collected: None where no process came so far."""

    collected: int | None = None
    outcomes: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def of(self, outcome: str) -> dict[str, str]:
        """Tests with that outcome -> why."""
        return {t: self.why.get(t, "") for t, found in self.outcomes.items() if found == outcome}

    def counts(self) -> dict[str, int]:
        found = Counter(self.outcomes.values())
        counts = {outcome: found[outcome] for outcome in OUTCOMES}
        return counts | {"not run": max((self.collected or 0) - len(self.outcomes), 0)}


def read(folder: Path, *, ended: bool) -> Results:
    """What is known by now. ended: pytest came to its end by itself; a test that has none is then
    one that has crashed. Raises OSError where pytest did not even begin.
    """
    results = Results()
    for line in _lines(folder / LOG):
        if "collected" in line:
            results.collected = line["collected"]
            continue
        test, outcome = line["test"], line["outcome"]
        before = results.outcomes.get(test, "unfinished")
        if before == "unfinished" or OUTCOMES.index(outcome) > OUTCOMES.index(before):
            results.outcomes[test], results.why[test] = outcome, line.get("why", "")
    last_words = dict(_last_words(folder))
    for test, outcome in results.outcomes.items():
        said = last_words.get(test, "")
        if faults.TIMEOUT.search(said):
            results.outcomes[test], results.why[test] = "hung", faults.where(said)
        elif outcome == "unfinished" and not ended:
            results.why[test] = faults.where(said)
        elif said:
            results.outcomes[test], results.why[test] = "crashed", said.partition("\n")[0]
        elif outcome == "unfinished":
            results.outcomes[test] = "crashed"
    return results


def _lines(path: Path) -> Iterator[dict]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # cut off
            continue


def _last_words(folder: Path) -> Iterator[tuple[str, str]]:
    """A test that its process did not come back from, and what was said then."""
    for path in folder.glob(f"*{LAST_WORDS}"):
        test, _, said = path.read_text(errors="replace").partition("\n")
        if test:
            yield test, said
